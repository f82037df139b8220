"""Prefetches: loads that cannot be left out and whose values nobody wants.

They may name any address: nothing is read. One that stands before a product, in its block, and
asks for as many rows as the product reads is woven into it, a line for each line that is read: many
lines at once keep the loads behind them waiting.
"""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.ir import Op, Type

_LINE = 64  # bytes
_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def fetch(emitter: Emitter, load: Op) -> None:
    """Ask for what ``load`` names: in the next product that has no other fetch, or at once."""
    assert load.block is not None
    for op in load.block.ops[load.index + 1 :]:
        if op.name == "tt.dot" and op not in emitter.fetches:
            emitter.fetches[op] = load
            return
    _write(emitter, load)


def woven(emitter: Emitter, product: Op, rows: int, columns: int, elem: Type) -> str:
    """Return the last argument of a product that reads a matrix [rows, columns] row by row.

    It is empty where nothing is to be fetched, or something of another shape.
    """
    load = emitter.fetches.get(product)
    lines, rest = divmod(columns * _BYTES[elem.elem], _LINE)
    if load is None or rest or load.operands[0].type.shape != (rows, lines):
        return ""
    del emitter.fetches[product]
    name, line = emitter.fresh("fetch"), emitter.fresh("line")
    with emitter.braces(f"auto {name} = [&](int {line}) TCPU_ALWAYS"):
        _write_at(emitter, load, (f"({line} / {lines})", f"({line} % {lines})"))
    emitter.write(";")
    return f", {name}"


def write_rest(emitter: Emitter, product: Op) -> None:
    """Ask for what was to be fetched in a product that could not do it."""
    load = emitter.fetches.pop(product, None)
    if load is not None:
        _write(emitter, load)


def _write(emitter: Emitter, load: Op) -> None:
    address = load.operands[0]

    def body(nest: Nest, index: Index) -> None:
        nest.statement(f"__builtin_prefetch({element(emitter, address, index, nest)});")

    write_loops(emitter, address.type.shape or (), body)


def _write_at(emitter: Emitter, load: Op, index: Index) -> None:
    def body(nest: Nest, nothing: Index) -> None:
        address = element(emitter, load.operands[0], index, nest)
        nest.statement(f"__builtin_prefetch({address});")

    write_loops(emitter, (), body)
