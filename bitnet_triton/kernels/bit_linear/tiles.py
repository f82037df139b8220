"""Pieces of kernels that forward and backward inline."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_codes(weight, scale, mean, BINARY: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Quantise a tile of master weights to codes in ``dtype``, which a product takes as they are.

    Ternary: round(w / scale) clipped to -1..1, written as two comparisons, which need no division
    and send the tie at scale / 2 to zero, as rounding to even does. Binary: the sign of w - mean.
    """
    w = weight.to(tl.float32)
    # bytes are chosen as words, beside which compilers for CPUs vectorise a choice better
    chosen: tl.constexpr = tl.int32 if dtype == tl.int8 else dtype
    one = tl.full((), 1, chosen)
    if BINARY:
        return tl.where(w > mean, one, -one).to(dtype)
    else:
        half = 0.5 * scale
        positive = tl.where(w > half, one, tl.full((), 0, chosen))
        return tl.where(w < -half, -one, positive).to(dtype)
