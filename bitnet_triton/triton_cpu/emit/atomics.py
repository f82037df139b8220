"""Atomic operations: read, write, change, and wait for what another program writes."""

from __future__ import annotations

import json
from collections.abc import Callable

from bitnet_triton.triton_cpu.emit.arrays import materialise, settle
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.order import finish_loads, fused_loads
from bitnet_triton.triton_cpu.emit.values import Buffer, row_major
from bitnet_triton.triton_cpu.ir import Op

# tt.atomic_rmw's operation, an enumeration of MLIR
_CHANGES = {
    1: "a_and", 2: "a_or", 3: "a_xor", 4: "a_add", 5: "a_fadd", 6: "a_max", 7: "a_min",
    8: "a_umax", 9: "a_umin", 10: "a_xchg",
}  # fmt: skip


@handles("tt.atomic_rmw", "tt.atomic_cas")
def _change(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    if op.results[0].is_block:
        finish_loads(emitter, op)
    if op.name == "tt.atomic_cas":
        _access(emitter, op, "a_cas", arguments=3)
    else:
        _access(emitter, op, _CHANGES[op.integer("atomic_rmw_op")], arguments=2)


@handles("tt.atomic_load")
def _load(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    _access(emitter, op, "a_load", arguments=1)


@handles("tt.atomic_store")
def _store(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    for operand in op.operands:
        # Whoever sees the first element may overwrite what the others are computed from
        if fused_loads(emitter, operand):
            materialise(emitter, operand)
    _access(emitter, op, "a_store", arguments=2)


def _access(emitter: Emitter, op: Op, function: str, arguments: int) -> None:
    """Call ``function`` for every element; a mask may follow its arguments among the operands."""

    def call(operands: list[str]) -> str:
        mask = operands[arguments:]
        done = f"{function}({', '.join(operands[:arguments])})"
        if not mask or mask == ["true"]:
            return done
        other = f"{c_type(op.results[0].type)}(0)" if op.results else "void()"
        return f"{mask[0]} ? {done} : {other}"

    _each(emitter, op, call)


@handles("tt.atomic_poll")
def _poll(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    poll = emitter.fresh("poll")
    limit = [f"({emitter.scalar(operand)})" for operand in op.operands[2:]]
    emitter.write(f"Poll {poll}{''.join(limit)};")
    _each(emitter, op, lambda operands: f"{poll}({', '.join(operands[:2])})")
    text = f"{op.location}: atomic_poll waits for a value that no running program will write"
    emitter.write(f"if ({poll}.hopeless()) {emitter.failure(json.dumps(text))}")


def _each(emitter: Emitter, op: Op, call: Callable[[list[str]], str]) -> None:
    """Write ``call`` of the operands of every element, now; hold the results."""
    result = op.results[0] if op.results else None
    if not op.operands[0].is_block:
        code = call([emitter.scalar(operand) for operand in op.operands])
        if result is None:
            emitter.write(f"{code};")
        else:
            emitter.define(result, code)
        return
    shape = op.operands[0].type.shape or ()
    name = None
    if result is not None and result.uses:
        name = emitter.array(result.type.size, c_type(result.type), "old")

    def body(nest: Nest, index: Index) -> None:
        code = call([element(emitter, operand, index, nest) for operand in op.operands])
        nest.statement(
            f"{name}[{row_major(shape, index)}] = {code};" if name else f"(void)({code});"
        )

    # Lanes may hit the same address: one after the other
    write_loops(emitter, shape, body, independent=False)
    if name and result is not None:
        emitter.held[result] = Buffer(name, emitter.block)
