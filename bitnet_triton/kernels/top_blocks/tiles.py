"""Pieces of the kernels that choose blocks: queries and units as tiles, and where a row lies."""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import load_rows, load_run
from bitnet_triton.kernels.common.tiles import round_half_even


@triton.jit
def load_heads(
    ptr, at, stride_h, is_row, GROUP: tl.constexpr, SIGN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the sum of GROUP heads of each row, or of what is positive or negative in them."""
    if GROUP == 1 and SIGN == 0:
        return load_rows(ptr, at, 1, is_row, D, BLOCK_D)
    else:
        total = tl.zeros((at.shape[0], BLOCK_D), tl.float32)
        for g in range(GROUP):
            q = load_rows(ptr, at + g * stride_h, 1, is_row, D, BLOCK_D).to(tl.float32)
            if SIGN > 0:
                q = tl.maximum(q, 0.0)
            elif SIGN < 0:
                q = tl.minimum(q, 0.0)
            total += q
        return total


@triton.jit
def load_units(
    ptr, unit, first, stride_u, is_unit, PLAIN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load units [N, D]; PLAIN: they are neighbours, from ``first`` on."""
    if PLAIN:
        lanes = tl.arange(0, unit.shape[0])
        return load_run(ptr, first, lanes, stride_u, is_unit, D, BLOCK_D)
    else:
        return load_rows(ptr, unit, stride_u, is_unit, D, BLOCK_D)


@triton.jit
def round_to_codes(q) -> tl.tensor:
    """Round rows [M, D] to int8 by their largest magnitude; the order of scores needs no scale."""
    q = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-30)
    codes = round_half_even(q * tl.div_rn(127.0, largest)[:, None])
    return codes.to(tl.int8)


@triton.jit
def sequence_range(leftpad_ptr, used_ptr, starts_ptr, b, Tq, Tk) -> tuple:
    """Return the queries and the keys of a sequence, its first column, and its first query."""
    n, first = Tk, b * 0
    if starts_ptr is not None:
        first = tl.load(starts_ptr + b)
        n = tl.load(starts_ptr + b + 1) - first
        return n, n, first, first
    else:
        if used_ptr is not None:
            n = tl.minimum(tl.load(used_ptr + b), Tk)
        if leftpad_ptr is not None:
            first = tl.minimum(tl.load(leftpad_ptr + b), n)
        return Tq, n - first, first, b * 0
