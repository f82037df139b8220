"""Facts about the IR that need no knowledge of how a value is stored."""

from __future__ import annotations

from collections.abc import Iterator

from bitnet_triton.triton_cpu.ir import Block, Op, Value

# Operations that only say where an element stands; they cost nothing once inlined
INDEXING = frozenset(
    {
        "arith.constant", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.make_range",
        "tt.splat", "tt.trans",
    }
)  # fmt: skip
_SLICED = INDEXING | {
    "arith.addi", "arith.extsi", "arith.muli", "arith.subi", "tt.reshape", "tt.unsplat",
}  # fmt: skip


def walk(blocks: list[Block]) -> Iterator[Op]:
    """Yield every operation of ``blocks``, those of nested regions included."""
    for block in blocks:
        for op in block.ops:
            yield op
            for region in op.regions:
                yield from walk(region)


_WRITERS = frozenset(
    {"tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_poll", "tt.call"}
)


def may_write(ops: list[Op]) -> bool:
    """Tell whether one of these operations, or of those inside them, may write to memory."""
    inner = walk([block for op in ops for region in op.regions for block in region])
    return any("store" in op.name or op.name in _WRITERS for op in (*ops, *inner))


def address_slice(blocks: list[Block]) -> set[Value]:
    """Return the integers that are only added and multiplied on their way into an address.

    Their arithmetic may be taken not to overflow: an address that wrapped around would be wild
    on any device. Without this the host compiler could not see that addresses are contiguous.
    """
    work = [op.operands[1] for op in walk(blocks) if op.name == "tt.addptr"]
    found: set[Value] = set()
    while work:
        value = work.pop()
        if value in found:
            continue
        found.add(value)
        if value.op is not None and value.op.name in _SLICED:
            work.extend(value.op.operands)
        elif value.op is None and value.block is not None:
            work.extend(_loop_sources(value))
    return found


def _loop_sources(value: Value) -> list[Value]:
    """Return where a loop-carried value comes from: its initial value and what is yielded."""
    if value.block is None or value.block.parent is None:
        return []
    loop = value.block.parent
    if loop.name != "scf.for":
        return []
    place = value.block.args.index(value) - 1
    if place < 0:
        return []
    return [loop.operands[3 + place], value.block.ops[-1].operands[place]]


def splat_integer(value: Value) -> int | None:
    """Return the integer that every element of a constant is; None for anything else."""
    text = _splat_text(value)
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text or "")
    except ValueError:
        return None


def is_zero(value: Value) -> bool:
    """Tell whether every element of a constant is 0, an integer or a float."""
    text = _splat_text(value) or ""
    try:
        return float(text) == 0
    except ValueError:
        return splat_integer(value) == 0


def _splat_text(value: Value) -> str | None:
    """Return how a constant is written whose elements are all the same; None for anything else."""
    op = value.op
    if op is not None and op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        return _splat_text(op.operands[0])
    if op is None or op.name != "arith.constant":
        return None
    text = op.attributes["value"].rpartition(" : ")[0].strip()
    return text.removeprefix("dense<").removesuffix(">")


def in_seven_bits(value: Value) -> bool:
    """Tell whether an int8 value provably lies in [0, 127]."""
    op = value.op
    if op is None:
        return False
    constant = splat_integer(value)
    if constant is not None:
        return 0 <= constant <= 127
    if op.name in ("tt.trans", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.splat"):
        return in_seven_bits(op.operands[0])
    if op.name == "arith.andi":
        return any(in_seven_bits(operand) for operand in op.operands)
    if op.name == "arith.shrui":
        shift = splat_integer(op.operands[1])
        return shift is not None and 0 < shift < 8
    return False


def base_pointer(value: Value) -> Value | None:
    """Return the function argument that a pointer is computed from; None if it is not one."""
    for _ in range(1000):
        op = value.op
        if op is None:
            block = value.block
            if block is None or block.parent is None or block.parent.name == "tt.func":
                return value
            sources = _loop_sources(value)
            if not sources:
                return None
            value = sources[0]
        elif op.name in _POINTER_STEPS:
            value = op.operands[0]
        else:
            return None
    return None


_POINTER_STEPS = frozenset(
    {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.bitcast"}
)


def offsets(value: Value) -> tuple[Value | None, tuple[Value, ...]]:
    """Return where a pointer starts (None for an argument) and what is added to it, in order.

    Two pointers with equal answers and equal bases are equal, element by element.
    """
    added: list[Value] = []
    while value.op is not None and value.op.name in _POINTER_STEPS - {"tt.trans"}:
        if value.op.name == "tt.addptr":
            added.append(value.op.operands[1])
        value = value.op.operands[0]
    is_argument = value.op is None and base_pointer(value) is value
    return (None if is_argument else value), tuple(added)


def invariant(value: Value, body: Block, depth: int = 0) -> bool:
    """Tell whether ``value`` is the same in every trip of the loop with this body, and cheap."""
    if value.op is not None and value.op.name == "arith.constant":
        return True
    if value.block is None or not value.block.inside(body):
        return True
    if value.op is None or depth > 8 or value.op.name not in _SLICED:
        return False
    return all(invariant(operand, body, depth + 1) for operand in value.op.operands)
