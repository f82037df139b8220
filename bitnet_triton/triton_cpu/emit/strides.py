"""How integers, addresses and data change from one element of a block to the next."""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import splat_integer
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.values import Buffer, Lazy
from bitnet_triton.triton_cpu.ir import Value

_DEPTH = 40
_SAME = frozenset({"arith.extsi", "arith.extui", "arith.trunci", "tt.broadcast"})
_ELEMENTWISE = ("arith.", "math.", "tt.fp_to_fp", "tt.bitcast")


def source_dim(value: Value, dim: int) -> int | None:
    """Return the dimension of the operand that ``dim`` of an indexing operation comes from."""
    op = value.op
    assert op is not None
    if op.name == "tt.expand_dims":
        axis = op.integer("axis")
        return None if dim == axis else dim - (dim > axis)
    if op.name == "tt.trans":
        return op.integers("order")[dim]
    return dim


def stride(emitter: Emitter, value: Value, dim: int, depth: int = 0) -> int | None:
    """Return the constant step of an integer or address along ``dim``; None when unknown."""
    shape = value.type.shape
    if shape is None or shape[dim] == 1:
        return 0
    held = emitter.held.get(value)
    if isinstance(held, Lazy):
        return held.stride(dim)
    op = value.op
    if held is not None or op is None or depth > _DEPTH:
        return None
    if op.name == "tt.make_range":
        return 1
    if op.name in ("tt.splat", "arith.constant"):
        return 0
    if op.name in ("tt.expand_dims", "tt.trans") or op.name in _SAME:
        source = source_dim(value, dim)
        return 0 if source is None else stride(emitter, op.operands[0], source, depth + 1)
    if op.name in ("tt.addptr", "arith.addi", "arith.subi", "arith.muli"):
        a, b = (stride(emitter, operand, dim, depth + 1) for operand in op.operands)
        if a is None or b is None:
            return None
        if op.name == "arith.muli":
            return _product_stride(op.operands, a, b)
        return a - b if op.name == "arith.subi" else a + b
    return None


def _product_stride(operands: list[Value], a: int, b: int) -> int | None:
    if a == 0 and b == 0:
        return 0
    factor = splat_integer(operands[1] if b == 0 else operands[0])
    return None if factor is None or (a and b) else (a or b) * factor


def linear(emitter: Emitter, value: Value, dim: int, depth: int = 0) -> bool:
    """Tell whether an address is linear in the index of ``dim``, perhaps with unknown step."""
    shape = value.type.shape
    if shape is None or shape[dim] == 1:
        return True
    held = emitter.held.get(value)
    if isinstance(held, Lazy):
        return held.linear(dim)
    op = value.op
    if held is not None or op is None or depth > _DEPTH:
        return False
    if op.name in ("tt.make_range", "tt.splat", "arith.constant"):
        return True
    if op.name in ("tt.expand_dims", "tt.trans", "tt.broadcast", "arith.extsi"):
        source = source_dim(value, dim)
        return source is None or linear(emitter, op.operands[0], source, depth + 1)
    if op.name in ("tt.addptr", "arith.addi", "arith.subi"):
        return all(linear(emitter, operand, dim, depth + 1) for operand in op.operands)
    if op.name == "arith.muli":
        a, b = op.operands
        constant = [stride(emitter, v, dim, depth + 1) == 0 for v in (a, b)]
        return any(constant) and all(linear(emitter, v, dim, depth + 1) for v in (a, b))
    return False


def data_stride(emitter: Emitter, value: Value, dim: int, depth: int = 0) -> int | None:
    """Return the step in memory from which the data of ``value`` comes; 2 stands for any other."""
    shape = value.type.shape
    if shape is None or shape[dim] == 1 or depth > _DEPTH:
        return None
    if isinstance(emitter.held.get(value), Buffer):
        return 1 if dim == len(shape) - 1 else 2
    op = value.op
    if op is None or value in emitter.held:
        return None
    if op.name == "tt.load":
        return stride(emitter, op.operands[0], dim)
    if op.name in ("tt.trans", "tt.expand_dims", "tt.broadcast"):
        source = source_dim(value, dim)
        return None if source is None else data_stride(emitter, op.operands[0], source, depth + 1)
    if op.name.startswith(_ELEMENTWISE):
        for operand in op.operands:
            found = data_stride(emitter, operand, dim, depth + 1)
            if found is not None:
                return found
    return None


def contiguous_along(emitter: Emitter, value: Value, dim: int) -> bool:
    """Tell whether neighbours along ``dim``, and along no later dimension, lie side by side."""
    rank = value.type.rank
    return data_stride(emitter, value, dim) == 1 and all(
        data_stride(emitter, value, other) != 1 for other in range(dim + 1, rank)
    )


def data_order(emitter: Emitter, value: Value) -> tuple[int, ...] | None:
    """Return the order of loops that reads memory contiguously; None for the order as it is."""
    rank = value.type.rank
    if rank < 2 or value.type.size <= 64:
        return None
    for dim in range(rank - 1):
        if contiguous_along(emitter, value, dim):
            return (*(d for d in range(rank) if d != dim), dim)
    return None
