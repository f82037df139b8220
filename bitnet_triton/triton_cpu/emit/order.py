"""Memory order: a block is loaded as a whole before a block is stored."""

from __future__ import annotations

from collections.abc import Iterator

from bitnet_triton.triton_cpu.analyse import base_pointer, offsets
from bitnet_triton.triton_cpu.emit.arrays import materialise
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.ir import Op, Value


def inlined(emitter: Emitter, value: Value) -> Iterator[Op]:
    """Yield the operations that reading ``value`` would perform, each once."""
    seen: set[Value] = set()
    work = [value]
    while work:
        value = work.pop()
        if value in seen or value in emitter.held or value.op is None or not value.is_block:
            continue
        seen.add(value)
        yield value.op
        work.extend(value.op.operands)


def fused_loads(emitter: Emitter, value: Value) -> list[Op]:
    """Return the loads that reading ``value`` would perform."""
    return [op for op in inlined(emitter, value) if op.name == "tt.load"]


def may_fuse(emitter: Emitter, load: Op, target: Value) -> bool:
    """Tell whether a load may run in the same loop as a store to ``target``.

    Element by element that is the same as block by block only if they touch the same element in
    the same trip, or never the same memory at all; the latter is assumed of different arguments,
    and noted for the launcher to check.
    """
    read, written = base_pointer(load.operands[0]), base_pointer(target)
    if read is None or written is None or not emitter.assume_disjoint:
        return False
    if read is written:
        return offsets(load.operands[0]) == offsets(target)
    args = emitter.function.regions[0][0].args
    if read not in args or written not in args:
        return False
    i, j = sorted((args.index(read), args.index(written)))
    emitter.disjoint.add((i, j))
    return True


def finish_loads(emitter: Emitter, op: Op) -> None:
    """Perform the loads that may not run in the same loop as the store ``op``."""
    target = op.operands[0]
    for operand in op.operands:
        if any(not may_fuse(emitter, load, target) for load in fused_loads(emitter, operand)):
            materialise(emitter, operand)
