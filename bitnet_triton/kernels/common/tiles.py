"""Pieces of kernels that several ops inline."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x) -> tl.tensor:
    """Round float32 values below 2**22 in magnitude to the nearest integer, ties to even."""
    # Adding 1.5 * 2**23 leaves no bits for a fraction: the adder itself rounds to even
    return (x + 12582912.0) - 12582912.0


@triton.jit
def weight_codes(weight, scale, mean, BINARY: tl.constexpr) -> tl.tensor:
    """Quantise a tile of master weights to int8 codes.

    Ternary: round(w / scale) clipped to -1..1, written as two comparisons, which need no division
    and send the tie at scale / 2 to zero, as rounding to even does. Binary: the sign of w - mean.
    """
    w = weight.to(tl.float32)
    if BINARY:
        return tl.where(w > mean, 1, -1).to(tl.int8)
    else:
        half = 0.5 * scale
        return (w > half).to(tl.int8) - (w < -half).to(tl.int8)
