"""Pieces of kernels that products of many and of few tokens inline.

A GPU has no instruction that shifts the four bytes of a register apart, but one that masks them.
So codes are multiplied where they stand in their byte, at 1, 4, 16 or 64 times their value, and
what they sum up to is shifted back once, at the end: an instruction or two for four weights, where
shifting byte by byte takes ten (docs/gpu-kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sums of codes in place reach 128 * 128 in magnitude for each of the K products: int32 holds fewer
IN_PLACE_K = 2**17


@triton.jit
def planes_in_place(packed) -> tuple:
    """Return the four planes of bytes as int8, in place: 1, 4 and 16 (code + 1), 64 (code - 1).

    The bits of the last plane say 128 too little or too much, as they end in the sign: flipping it
    makes them linear again.
    """
    w0 = (packed & 3).to(tl.int8, bitcast=True)
    w1 = (packed & 12).to(tl.int8, bitcast=True)
    w2 = (packed & 48).to(tl.int8, bitcast=True)
    w3 = ((packed & 192) ^ 128).to(tl.int8, bitcast=True)
    return w0, w1, w2, w3


@triton.jit
def sums_in_place(acc0, acc1, acc2, acc3, sums) -> tuple:
    """Turn sums over planes in place into sums over codes, with the sums of the activations."""
    return acc0 - sums, (acc1 >> 2) - sums, (acc2 >> 4) - sums, (acc3 >> 6) + sums


@triton.jit
def store_plane(
    acc, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, first_row, in_tile, N,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """Scale acc [BLOCK_R, BLOCK_M] once and store it at y[tokens, first_row + rows].

    A residual is added to what has been rounded to the dtype of y, as a sum of two tensors is.
    """
    y = acc.to(tl.float32) * scales[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_row + rows, mask=first_row + rows < N, other=0.0)
        y += bias.to(tl.float32)[:, None]
    place = tokens[None, :] * N + (first_row + rows)[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + place, mask=in_tile, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place, y, mask=in_tile)
