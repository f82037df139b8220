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
def store_quantized_row(
    x, codes_ptr, scale_ptr, sums_ptr, row, K, cols, WITH_SUMS: tl.constexpr
) -> None:
    """Quantise x [BLOCK_K] float32, 0 from K on, by its largest magnitude; store as row ``row``."""
    # bit patterns of magnitudes order like the magnitudes, with NaN on top: tl.max drops NaN
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0)
    gamma = bits.to(tl.float32, bitcast=True)
    gamma = tl.where(gamma < 1e-5, 1e-5, gamma)
    # div_rn: the approximate division of GPUs moves codes at ties
    codes = round_half_even(x * tl.div_rn(127.0, gamma))
    codes = tl.minimum(tl.maximum(codes, -128.0), 127.0)

    tl.store(codes_ptr + row * K + cols, codes.to(tl.int8), mask=cols < K)
    tl.store(scale_ptr + row, tl.div_rn(gamma, 127.0))
    if WITH_SUMS:
        tl.store(sums_ptr + row, tl.sum(codes.to(tl.int32), axis=0))


@triton.jit
def part_of_tile(tile, R, end0, end1, PARTS: tl.constexpr, BLOCK_R: tl.constexpr) -> tuple:
    """Find a tile in a packed matrix of R byte rows that holds up to three matrices, its parts.

    They lie below one another and end at byte rows end0, end1 and R; no tile crosses the border of
    two. Returns the number of the part, the byte rows at which it starts and ends, and the first
    byte row of the tile.
    """
    if PARTS == 1:
        part = tile * 0
        start = part
        end = R
        first = tile * BLOCK_R
    else:
        tiles0 = tl.cdiv(end0, BLOCK_R)
        tiles1 = tiles0 + tl.cdiv(end1 - end0, BLOCK_R)
        in0 = tile < tiles0
        in1 = tile < tiles1
        part = tl.where(in0, 0, tl.where(in1, 1, 2))
        start = tl.where(in0, 0, tl.where(in1, end0, end1))
        end = tl.where(in0, end0, tl.where(in1, end1, R))
        first = start + (tile - tl.where(in0, 0, tl.where(in1, tiles0, tiles1))) * BLOCK_R
    return part, start, end, first
