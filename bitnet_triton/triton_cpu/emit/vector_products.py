"""Which products are computed row by row: those of a matrix with one vector or a few."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit.bytes import BYTES, in_bytes
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.views import (
    address_step,
    is_listed,
    is_memory,
    untransposed,
)
from bitnet_triton.triton_cpu.ir import Op, Value

# Bytes of a row from which on its sums are added up at once, and more than a few vectors pay
_LONG_ROW = 1024
_MOST_VECTORS = 4
# of bytes: more than a few pay only where rows are long, as sums are read and written once a row
_MOST_BYTE_VECTORS = 32
_ROWS = 4


@dataclass(frozen=True)
class VectorProduct:
    """A product seen as matrix [rows, depth] times vectors [count, depth].

    Attributes:
        matrix: the operand with many rows.
        vectors: the other one.
        along: dimension of ``matrix`` that is summed.
        count: number of vectors.
        rows: number of rows, a multiple of 16.
        depth: length of the sums.
        is_listed: the rows of ``matrix`` lie anywhere in memory.
    """

    op: Op
    matrix: Value
    vectors: Value
    along: int
    count: int
    rows: int
    depth: int
    is_listed: bool = False


def vector_product(emitter: Emitter, op: Op) -> VectorProduct | None:
    """Return how a product is computed row by row; None if it is better packed."""
    a, b, _ = op.operands[:3]
    if a.type.rank != 2 or a.type.elem != b.type.elem:
        return None
    (m, k), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    left, right = VectorProduct(op, b, a, 0, m, n, k), VectorProduct(op, a, b, 1, n, m, k)
    result = op.results[0].type.elem
    if a.type.elem == "i8" and result == "i32":
        both = [product for product in (left, right) if _fits_bytes(emitter, product)]
        # what has to be unpacked is the matrix: that is done once for all vectors
        return min(both, key=lambda p: (not _is_plain(emitter, p.vectors), p.count), default=None)
    few = left if m <= n else right
    # Partial sums of several vectors lie one vector after the other: only as rows of the result
    fits = few.count == 1 or (few.count <= _MOST_VECTORS and few.along == 0)
    floats = a.type.elem in ("f32", "bf16", "f16") and result == "f32"
    if floats and fits and few.rows % _ROWS == 0:
        root, order = untransposed(emitter, few.matrix)
        unit = order[few.along]
        if is_memory(emitter, root) and address_step(emitter, root, unit) == 1:
            return few
        if is_listed(emitter, root, unit):
            return dataclasses.replace(few, is_listed=True)
    return None


def _fits_bytes(emitter: Emitter, product: VectorProduct) -> bool:
    most = _MOST_BYTE_VECTORS if product.depth >= _LONG_ROW else _MOST_VECTORS
    return (
        product.count <= most
        and product.rows % _ROWS == 0
        and product.depth % BYTES == 0
        and in_bytes(emitter, product.matrix, product.along)
    )


def _is_plain(emitter: Emitter, value: Value) -> bool:
    root, _ = untransposed(emitter, value)
    return emitter.buffer(root) is not None or is_memory(emitter, root)


def adds_up(product: VectorProduct) -> bool:
    """Tell whether rows are long enough to add up the lanes of a sum after each one."""
    return product.matrix.type.elem == "i8" and product.depth >= _LONG_ROW
