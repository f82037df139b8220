"""Loads of scalars, stores and atomics."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.elements import load_expression
from bitnet_triton.triton_cpu.emit.emitter import Emitter, handles
from bitnet_triton.triton_cpu.emit.nest import Nest
from bitnet_triton.triton_cpu.emit.order import finish_loads
from bitnet_triton.triton_cpu.emit.strides import stride
from bitnet_triton.triton_cpu.emit.values import Buffer, Index, Scalar, row_major
from bitnet_triton.triton_cpu.ir import Op, Value

# tt.atomic_rmw's operation, an enumeration of MLIR
_ATOMICS = {
    1: "a_and", 2: "a_or", 3: "a_xor", 4: "a_add", 5: "a_fadd", 6: "a_max", 7: "a_min",
    8: "a_umax", 9: "a_umin", 10: "a_xchg",
}  # fmt: skip


@handles("tt.load")
def _load(emitter: Emitter, op: Op) -> None:
    result = op.results[0]
    if result.is_block:
        emitter.defer(op)
        if op.flag("isVolatile"):
            emitter.materialise(result)
        return
    operands = [emitter.scalar(operand) for operand in op.operands]
    code = load_expression(operands[0], result)
    if len(operands) > 1:
        other = operands[2] if len(operands) > 2 else f"{c_type(result.type)}(0)"
        code = f"{operands[1]} ? {code} : {other}"
    emitter.define(result, code)


@handles("tt.store")
def _store(emitter: Emitter, op: Op) -> None:
    emitter.settle(op)
    target = op.operands[0]
    if not target.is_block:
        address, value, *mask = (emitter.scalar(operand) for operand in op.operands)
        condition = f"if ({mask[0]}) " if mask else ""
        emitter.write(f"{condition}{_write(op, address, value)}")
        return
    finish_loads(emitter, op)

    def body(nest: Nest, index: Index) -> None:
        mask = emitter.element(op.operands[2], index, nest) if len(op.operands) > 2 else "true"
        if mask == "false":
            return
        address, value = (emitter.element(v, index, nest) for v in op.operands[:2])
        condition = f"if ({mask}) " if mask != "true" else ""
        nest.statement(condition + _write(op, address, value))

    emitter.loops(target.type.shape or (), body, _store_order(emitter, target))


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


@handles("tt.atomic_rmw", "tt.atomic_cas")
def _atomic(emitter: Emitter, op: Op) -> None:
    emitter.settle(op)
    function = "a_cas"
    if op.name == "tt.atomic_rmw":
        function = _ATOMICS[op.integer("atomic_rmw_op")]
    arguments = 3 if function == "a_cas" else 2
    result = op.results[0]
    if not result.is_block:
        operands = [emitter.scalar(operand) for operand in op.operands]
        emitter.define(result, _call(function, operands, arguments, c_type(result.type)))
        return
    finish_loads(emitter, op)
    name = emitter.array(result.type.size, c_type(result.type), "old") if result.uses else None

    def body(nest: Nest, index: Index) -> None:
        operands = [emitter.element(operand, index, nest) for operand in op.operands]
        call = _call(function, operands, arguments, c_type(result.type))
        place = row_major(result.type.shape or (), index)
        nest.statement(f"{name}[{place}] = {call};" if name else f"(void)({call});")

    # Lanes may hit the same address: one after the other
    emitter.loops(result.type.shape or (), body, independent=False)
    if name:
        emitter.held[result] = Buffer(name, emitter.block)


def _call(function: str, operands: list[str], arguments: int, c_elem: str) -> str:
    call = f"{function}({', '.join(operands[:arguments])})"
    if len(operands) == arguments or operands[arguments] == "true":
        return call
    return f"{operands[arguments]} ? {call} : {c_elem}(0)"


@handles("tt.get_program_id")
def _program_id(emitter: Emitter, op: Op) -> None:
    emitter.held[op.results[0]] = Scalar(f"pid{op.integer('axis')}")


@handles("tt.get_num_programs")
def _num_programs(emitter: Emitter, op: Op) -> None:
    emitter.held[op.results[0]] = Scalar(f"programs{op.integer('axis')}")
