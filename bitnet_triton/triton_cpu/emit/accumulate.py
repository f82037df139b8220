"""Where products add to: an array that starts as their third operand and becomes the result."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.arrays import reusable, store_into
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.values import Buffer
from bitnet_triton.triton_cpu.ir import Op

HALVES = frozenset({"f16", "bf16"})


def accumulator(emitter: Emitter, op: Op) -> tuple[str, str]:
    """Return an array that starts as the third operand, and its type: in place if that dies."""
    start, result = op.operands[2], op.results[0]
    if result.type.elem in HALVES:
        name = emitter.array(result.type.size, "float", "sums")
        store_into(emitter, start, name, "float")
        return name, "float"
    name = reusable(emitter, start) or emitter.array(
        result.type.size, c_type(result.type), result.name or "sums"
    )
    buffer = emitter.buffer(start)
    if buffer is None or buffer.name != name:
        store_into(emitter, start, name)
    return name, c_type(result.type)


def finish(emitter: Emitter, op: Op, name: str, c_sum: str) -> None:
    """Hold the result in the accumulator, rounded if it was summed in float."""
    result = op.results[0]
    c_elem = c_type(result.type)
    if c_sum != c_elem:
        rounded = emitter.array(result.type.size, c_elem, result.name or "dot")
        emitter.write("#pragma GCC ivdep")
        emitter.write(
            f"for (int i = 0; i < {result.type.size}; ++i) {rounded}[i] = {c_elem}({name}[i]);"
        )
        name = rounded
    emitter.held[result] = Buffer(name, emitter.block)
