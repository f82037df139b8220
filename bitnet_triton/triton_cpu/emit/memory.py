"""Loads of scalars, stores, and which program this is."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.arrays import materialise, settle
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.deferral import defer
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import element, load_expression
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.fetches import fetch
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.order import finish_loads
from bitnet_triton.triton_cpu.emit.strides import stride
from bitnet_triton.triton_cpu.emit.values import Scalar
from bitnet_triton.triton_cpu.ir import Op, Value


@handles("tt.load")
def _load(emitter: Emitter, op: Op) -> None:
    result = op.results[0]
    if result.is_block:
        if op.flag("isVolatile") and not result.uses:
            fetch(emitter, op)
            return
        defer(emitter, op)
        if op.flag("isVolatile"):
            materialise(emitter, result)
        return
    operands = [emitter.scalar(operand) for operand in op.operands]
    code = load_expression(operands[0], op)
    if len(operands) > 1:
        other = operands[2] if len(operands) > 2 else f"{c_type(result.type)}(0)"
        code = f"{operands[1]} ? {code} : {other}"
    emitter.define(result, code)


@handles("tt.store")
def _store(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    target = op.operands[0]
    if not target.is_block:
        address, value, *mask = (emitter.scalar(operand) for operand in op.operands)
        condition = f"if ({mask[0]}) " if mask else ""
        emitter.write(f"{condition}{_write(op, address, value)}")
        return
    finish_loads(emitter, op)

    def body(nest: Nest, index: Index) -> None:
        mask = element(emitter, op.operands[2], index, nest) if len(op.operands) > 2 else "true"
        if mask == "false":
            return
        address, value = (element(emitter, v, index, nest) for v in op.operands[:2])
        condition = f"if ({mask}) " if mask != "true" else ""
        nest.statement(condition + _write(op, address, value))

    write_loops(emitter, target.type.shape or (), body, _store_order(emitter, target))


def _write(op: Op, address: str, value: str) -> str:
    if op.operands[1].type.elem == "i1":
        return f"*(uint8_t*)({address}) = {value};"
    return f"*({c_type(op.operands[1].type)}*)({address}) = {value};"


def _store_order(emitter: Emitter, target: Value) -> tuple[int, ...] | None:
    """Return the order of loops that writes memory contiguously."""
    rank = target.type.rank
    steps = [stride(emitter, target, dim) for dim in range(rank)]
    if 1 not in steps or steps[-1] == 1:
        return None
    last = steps.index(1)
    return (*(dim for dim in range(rank) if dim != last), last)


@handles("tt.get_program_id")
def _program_id(emitter: Emitter, op: Op) -> None:
    emitter.held[op.results[0]] = Scalar(f"pid{op.integer('axis')}")


@handles("tt.get_num_programs")
def _num_programs(emitter: Emitter, op: Op) -> None:
    emitter.held[op.results[0]] = Scalar(f"programs{op.integer('axis')}")
