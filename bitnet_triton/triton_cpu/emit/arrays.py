"""Values in arrays: written out as a whole, or computed into the array of a value that dies."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.strides import data_order
from bitnet_triton.triton_cpu.emit.values import Buffer, row_major
from bitnet_triton.triton_cpu.ir import Op, Value, used_after


def store_into(emitter: Emitter, value: Value, name: str, c_elem: str | None = None) -> None:
    """Write all elements of ``value`` to an array in row-major order."""
    shape = value.type.shape or ()

    def body(nest: Nest, index: Index) -> None:
        code = element(emitter, value, index, nest)
        place = row_major(shape, index)
        nest.statement(f"{name}[{place}] = {f'{c_elem}({code})' if c_elem else code};")

    write_loops(emitter, shape, body, data_order(emitter, value))


def materialise(emitter: Emitter, value: Value) -> Buffer:
    """Hold ``value`` in an array of its own, from here on."""
    held = emitter.held.get(value)
    if isinstance(held, Buffer):
        return held
    name = emitter.array(value.type.size, c_type(value.type), value.name or "b")
    store_into(emitter, value, name)
    return emitter.hold_in_array(value, name)


def settle(emitter: Emitter, op: Op) -> None:
    """Before a side effect or a region: write out what was read from memory and is needed."""
    waiting = []
    for value in emitter.pending:
        if isinstance(emitter.held.get(value), Buffer):
            continue
        if value.block is not op.block:
            waiting.append(value)
        elif used_after(value, op) or (op.regions and op in value.uses):
            materialise(emitter, value)
    emitter.pending = waiting


def reusable(emitter: Emitter, value: Value) -> str | None:
    """Return an array that ``value`` may be computed into because an operand dies there."""
    if len(value.uses) != 1:
        return None
    held = emitter.held.get(value)
    if isinstance(held, Buffer):
        return held.name if held.owner is emitter.block else None
    op = value.op
    if held is not None or op is None or op.block is not emitter.block:
        return None
    if not op.name.startswith("arith.") or op.name == "arith.constant":
        return None
    for operand in op.operands:
        if operand.type == value.type and (name := reusable(emitter, operand)):
            return name
    return None
