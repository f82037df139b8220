"""Calls that were not inlined, and what a kernel tells its user: assertions and prints."""

from __future__ import annotations

import json

from bitnet_triton.triton_cpu.emit.arrays import settle, store_into
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.values import Buffer
from bitnet_triton.triton_cpu.ir import Op, Value
from bitnet_triton.triton_cpu.native import NativeCall, lookup


@handles("tt.call")
def _call(emitter: Emitter, op: Op) -> None:
    """Call a library function that was kept; all others were inlined."""
    settle(emitter, op)
    native = lookup(op.attributes["callee"])
    assert native is not None
    _sort(emitter, op, native)


def _sort(emitter: Emitter, op: Op, native: NativeCall) -> None:
    """Sort every row of a block; the axis is always the last one."""
    source, result = op.operands[0], op.results[0]
    elem = c_type(source.type)
    n, k = (source.type.shape or (1,))[-1], (result.type.shape or (1,))[-1]
    rows = source.type.size // n
    array = emitter.array(source.type.size, elem, "rows")
    store_into(emitter, source, array)
    name = array if native.kind == "sort" else emitter.array(rows * k, elem, result.name)
    number = f"u{elem}" if native.unsigned else elem
    order = "true" if native.descending else "false"
    at = emitter.fresh("row")
    with emitter.braces(f"for (int {at} = 0; {at} < {rows}; ++{at})"):
        row = f"({number}*){array} + {at} * {n}"
        if native.kind == "sort":
            emitter.write(f"sort_row<{number}, {order}, {n}>({row});")
        else:
            top = f"({number}*){name} + {at} * {k}"
            emitter.write(f"topk_row<{number}, {order}, {n}, {k}>({row}, {top});")
    emitter.held[result] = Buffer(name, emitter.block)


@handles("tt.assert")
def _assert(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    condition = op.operands[0]
    message = json.dumps(f"{op.location}: {_text(op, 'message')}")
    failure = emitter.failure(message)
    if not condition.is_block:
        emitter.write(f"if (!{emitter.scalar(condition)}) {failure}")
        return

    def body(nest: Nest, index: Index) -> None:
        nest.statement(f"if (!{element(emitter, condition, index, nest)}) {failure}")

    write_loops(emitter, condition.type.shape or (), body, independent=False)


@handles("tt.print")
def _print(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    prefix, hexadecimal = _text(op, "prefix"), op.flag("hex")
    signed = op.integers("isSigned")
    if not op.operands:
        emitter.write(f"print_text({json.dumps(prefix)}, pid0, pid1, pid2);")
    for place, value in enumerate(op.operands):
        is_signed = not signed or bool(signed[place])
        which = f"(operand {place}) " if len(op.operands) > 1 else ""
        _print_value(emitter, value, prefix + which, hexadecimal, is_signed)


def _print_value(
    emitter: Emitter, value: Value, prefix: str, hexadecimal: bool, is_signed: bool
) -> None:
    flags = f"{'true' if hexadecimal else 'false'}, {'true' if is_signed else 'false'}"
    start = f"{json.dumps(prefix)}, pid0, pid1, pid2"
    if not value.is_block:
        emitter.write(
            f"print_value({start}, nullptr, nullptr, 0, {emitter.scalar(value)}, {flags});"
        )
        return

    shape = value.type.shape or ()
    widths = ", ".join(str(len(str(size - 1))) for size in shape)

    def body(nest: Nest, index: Index) -> None:
        code = element(emitter, value, index, nest)
        nest.statement(
            f"{{ const int places[] = {{{', '.join(index)}}}, widths[] = {{{widths}}}; "
            f"print_value({start}, places, widths, {len(index)}, {code}, {flags}); }}"
        )

    write_loops(emitter, shape, body, independent=False)


def _text(op: Op, attribute: str) -> str:
    return op.attributes.get(attribute, '""').strip('"')
