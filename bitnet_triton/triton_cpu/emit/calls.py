"""Calls that were not inlined, and what a kernel tells its user: assertions and prints."""

from __future__ import annotations

import copy
import json

from bitnet_triton.triton_cpu.emit.arrays import materialise, settle, store_into
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles, run_block
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.order import fused_loads
from bitnet_triton.triton_cpu.emit.strides import linear, stride
from bitnet_triton.triton_cpu.emit.values import Buffer, Lazy, Scalar
from bitnet_triton.triton_cpu.ir import Op, Value
from bitnet_triton.triton_cpu.native import NativeCall, lookup


@handles("tt.call")
def _call(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    callee = op.attributes["callee"].lstrip("@").strip('"')
    native = lookup(callee)
    if native is not None:
        _sort(emitter, op, native)
        return
    function = emitter.functions.get(callee)
    if function is None or len(function.regions[0]) != 1:
        raise op.unsupported(f"the function `{callee}` returns early or is not known")
    _inline(emitter, op, function)


def _inline(emitter: Emitter, op: Op, function: Op) -> None:
    """Emit the body of a function in place of a call to it."""
    body = copy.deepcopy(function).regions[0][0]
    for argument, operand in zip(body.args, op.operands):
        if fused_loads(emitter, operand):
            materialise(emitter, operand)
        buffer = emitter.buffer(operand)
        if not operand.is_block:
            emitter.held[argument] = Scalar(emitter.scalar(operand))
        else:
            emitter.held[argument] = Buffer(buffer.name) if buffer else _alias(emitter, operand)
    for result in op.results:
        name = emitter.array(result.type.size if result.is_block else 1, c_type(result.type))
        emitter.held[result] = Buffer(name) if result.is_block else Scalar(f"{name}[0]")
    with emitter.braces(), emitter.scope(body):
        end = run_block(emitter, body)
        for result, source in zip(op.results, end.operands):
            held = emitter.held[result]
            if isinstance(held, Buffer):
                store_into(emitter, source, held.name)
            else:
                emitter.write(f"{emitter.scalar(result)} = {emitter.scalar(source)};")


def _alias(emitter: Emitter, value: Value) -> Lazy:
    return Lazy(
        lambda index, nest: element(emitter, value, index, nest),
        lambda dim: stride(emitter, value, dim),
        lambda dim: linear(emitter, value, dim),
    )


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
    failure = f"{{ fail({message}, pid0, pid1, pid2); return; }}"
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
        _print_value(emitter, value, prefix, hexadecimal, is_signed)


def _print_value(
    emitter: Emitter, value: Value, prefix: str, hexadecimal: bool, is_signed: bool
) -> None:
    flags = f"{'true' if hexadecimal else 'false'}, {'true' if is_signed else 'false'}"
    start = f"{json.dumps(prefix)}, pid0, pid1, pid2"
    if not value.is_block:
        emitter.write(f"print_value({start}, nullptr, 0, {emitter.scalar(value)}, {flags});")
        return

    def body(nest: Nest, index: Index) -> None:
        code = element(emitter, value, index, nest)
        nest.statement(
            f"{{ const int places[] = {{{', '.join(index)}}}; "
            f"print_value({start}, places, {len(index)}, {code}, {flags}); }}"
        )

    write_loops(emitter, value.type.shape or (), body, independent=False)


def _text(op: Op, attribute: str) -> str:
    return op.attributes.get(attribute, '""').strip('"')
