"""Decide a condition for all elements of a block at once.

Masks are conjunctions of comparisons between integers that grow or fall along each dimension:
their extremes stand at corners of the block. Where a mask holds at the worst corner, it holds
everywhere, and the loop nest needs no masks at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitnet_triton.triton_cpu.analyse import splat_integer
from bitnet_triton.triton_cpu.emit.ctypes import BITS
from bitnet_triton.triton_cpu.emit.elements import element_now
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.strides import source_dim, stride
from bitnet_triton.triton_cpu.ir import Op, Value

_LESS = {2: "<", 3: "<="}
_GREATER = {4: ">", 5: ">="}
_PASSED_THROUGH = frozenset({"tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape"})
_DEPTH = 24


def holds_everywhere(emitter: Emitter, mask: Value, depth: int = 0) -> str | None:
    """Return a C++ condition under which every element of ``mask`` is true; None if unknown.

    What the condition needs is written at the current place in the program.
    """
    if splat_integer(mask) is not None:
        return "true" if splat_integer(mask) else None
    op = mask.op
    if mask in emitter.held or op is None or depth > _DEPTH:
        return None
    if op.name in _PASSED_THROUGH:
        return holds_everywhere(emitter, op.operands[0], depth + 1)
    if op.name == "tt.splat":
        return emitter.scalar(op.operands[0])
    if op.name in ("arith.andi", "arith.ori"):
        parts = [holds_everywhere(emitter, operand, depth + 1) for operand in op.operands]
        if op.name == "arith.andi":
            return None if None in parts else f"({parts[0]} && {parts[1]})"
        known = [part for part in parts if part is not None]
        return f"({' || '.join(known)})" if known else None
    return _compare(emitter, op) if op.name == "arith.cmpi" else None


def prefix(emitter: Emitter, mask: Value, dim: int | None) -> tuple[list[str], list[str]] | None:
    """Split a mask that lets the first elements along ``dim`` pass, the same number everywhere.

    Returns:
        Conditions for the rest of the mask to hold everywhere, and numbers of elements that pass
        (the smallest of them do); None if the mask is not of this kind.
    """
    found = prefixes(emitter, mask, (dim,))
    return None if found is None else (found[0], found[1][0])


def prefixes(
    emitter: Emitter, mask: Value, dims: tuple[int | None, ...]
) -> tuple[list[str], list[list[str]]] | None:
    """Split a mask that lets a corner of the block pass: ``prefix`` for several dimensions at once.

    Returns:
        Conditions as ``prefix`` does, and for each of ``dims`` numbers of elements that pass.
    """
    op = mask.op
    if op is not None and mask not in emitter.held:
        if op.name == "arith.andi":
            parts = [prefixes(emitter, operand, dims) for operand in op.operands]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            numbers = [[n for part in known for n in part[1][i]] for i in range(len(dims))]
            return [c for part in known for c in part[0]], numbers
        if op.name in ("tt.broadcast", "tt.expand_dims", "tt.trans"):
            sources = tuple(None if dim is None else source_dim(mask, dim) for dim in dims)
            return prefixes(emitter, op.operands[0], sources)
        for i, dim in enumerate(dims):
            found = None if dim is None else _first_elements(emitter, op, dim)
            if found is not None:
                return found[0], [[found[1]] if i == j else [] for j in range(len(dims))]
    condition = holds_everywhere(emitter, mask)
    return None if condition is None else ([condition], [[] for _ in dims])


def _first_elements(emitter: Emitter, op: Op, dim: int) -> tuple[list[str], str] | None:
    """Return how many elements along ``dim`` pass a comparison, and what must hold for that."""
    if op.name != "arith.cmpi" or op.integer("predicate") != 2:
        return None
    left, right = op.operands
    others = [d for d in range(left.type.rank) if d != dim]
    flat = all(stride(emitter, v, d) == 0 for v in op.operands for d in others)
    if not flat or stride(emitter, left, dim) != 1 or stride(emitter, right, dim) != 0:
        return None
    first = ("0",) * left.type.rank
    start, bound = (element_now(emitter, v, first) for v in op.operands)
    return _unwrapped(emitter, left, dim, start), f"int64_t({bound}) - int64_t({start})"


def _unwrapped(emitter: Emitter, value: Value, dim: int, start: str) -> list[str]:
    """Return the condition that integers that grow along ``dim`` do not wrap around."""
    if emitter.is_address(value):
        return []
    shape = value.type.shape or ()
    last = tuple(str(size - 1) if d == dim else "0" for d, size in enumerate(shape))
    return [f"({start} <= {element_now(emitter, value, last)})"]


def may_hold_everywhere(emitter: Emitter, mask: Value, depth: int = 0) -> bool:
    """Tell whether ``holds_everywhere`` has an answer; writes nothing."""
    if splat_integer(mask) is not None:
        return bool(splat_integer(mask))
    op = mask.op
    if mask in emitter.held or op is None or depth > _DEPTH:
        return False
    if op.name == "tt.splat":
        return True
    if op.name in _PASSED_THROUGH:
        return may_hold_everywhere(emitter, op.operands[0], depth + 1)
    if op.name in ("arith.andi", "arith.ori"):
        parts = [may_hold_everywhere(emitter, operand, depth + 1) for operand in op.operands]
        return all(parts) if op.name == "arith.andi" else any(parts)
    if op.name != "arith.cmpi" or op.integer("predicate") not in _LESS | _GREATER:
        return False
    return all(_span(emitter, operand) is not None for operand in op.operands)


def outermost(emitter: Emitter, masks: Iterable[Value]) -> list[Value]:
    """Return the masks that can be decided, without those that only serve another one."""
    found: list[Value] = []
    parts: set[Value] = set()
    for mask in masks:  # what a mask is made of comes after it
        if mask in parts or may_hold_everywhere(emitter, mask):
            parts.update(mask.op.operands if mask.op is not None else ())
            if mask not in parts:
                found.append(mask)
    return found


def _compare(emitter: Emitter, op: Op) -> str | None:
    predicate = op.integer("predicate")
    sign = _LESS.get(predicate) or _GREATER.get(predicate)
    if sign is None:
        return None
    left = _extreme(emitter, op.operands[0], highest=predicate in _LESS)
    right = _extreme(emitter, op.operands[1], highest=predicate in _GREATER)
    if left is None or right is None:
        return None
    return " && ".join([f"({left[0]} {sign} {right[0]})", *left[1], *right[1]])


def _extreme(emitter: Emitter, value: Value, highest: bool) -> tuple[str, list[str]] | None:
    """Return the largest or smallest element, and what must hold for it to be that."""
    span = _span(emitter, value)
    if span is None:
        return None
    shape = value.type.shape or ()
    steps = [stride(emitter, value, dim) or 0 for dim in range(len(shape))]
    corners = [
        tuple(
            str(size - 1) if step and (step > 0) == up else "0" for step, size in zip(steps, shape)
        )
        for up in (False, True)
    ]
    if span == 0:
        return element_now(emitter, value, corners[0]), []
    low, high = (element_now(emitter, value, corner) for corner in corners)
    # An integer that wraps around inside the block stands in the wrong order at its ends
    ordered = [] if emitter.is_address(value) else [f"({low} <= {high})"]
    return (high if highest else low), ordered


def _span(emitter: Emitter, value: Value) -> int | None:
    """Return by how much the elements differ; None if unknown, or more than can be compared."""
    span = 0
    for dim, size in enumerate(value.type.shape or ()):
        step = stride(emitter, value, dim)
        if step is None:
            return None
        span += abs(step) * (size - 1)
    return span if span < 2 ** (BITS.get(value.type.elem, 1) - 1) else None
