"""Pieces of the backward of attention (arXiv:2307.08691, algorithm 2), from both sides."""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import (
    CLASS,
    column_bounds,
    count_keys,
    count_up_to,
    find_rows,
    floor_div,
    key_positions,
    list_range,
    load_run,
    row_class,
    sequence_lengths,
    split_tiles,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score_scale(scale_log2, softcap_log2) -> tl.tensor:
    """Return what the scores were multiplied with before the cap."""
    if softcap_log2 is None:
        return scale_log2 * _LN_2
    else:
        return scale_log2 * softcap_log2 * _LN_2


@triton.jit
def add_dq(acc, scores, slope, dout, pivot, delta, k, v, visible) -> tl.tensor:
    """Add what one tile of keys gives to dq, without the scale; visible is None for all pairs."""
    weights = tl.exp2(scores - pivot[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    dscores = weights * (dweights - delta[:, None]) * slope
    return tl.dot(dscores.to(k.dtype), k, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_D]


@triton.jit
def add_dkdv(dk, dv, scores, slope, q, dout, pivot, delta, v, visible) -> tuple:
    """Add what one tile of rows gives to dk, without the scale, and dv; scores are transposed."""
    weights = tl.exp2(scores - pivot[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    dscores = weights * (dweights - delta[None, :]) * slope
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def open_keys(
    lengths_ptr, keys_ptr, b, tile, B, Tq, Tk, step, block, summary,
    KIND: tl.constexpr, DILATED: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return what a program knows of its tile of keys.

    Their positions j and numbers s, which of them exist, the s and the j of the first and the last
    one, the remainder c of their class; the first valid key; the first valid row, how many there
    are, and the position of row 0; and what strides of a batch count, for inputs and for results.
    """
    start_q, n_q, start_k, n_k = sequence_lengths(lengths_ptr, b, Tq, Tk)
    batch = b.to(tl.int64)
    flat = batch * 0 if B is not None else batch
    if KIND == CLASS:
        # keys are numbered like rows that stand at offset 0
        j, s, c, is_key, first, last = find_rows(keys_ptr, b, B, tile, n_k, 0, step, DILATED, BLOCK)
        j0 = c + step * first if DILATED else first
        j1 = c + step * last if DILATED else last
        return (
            j, s, is_key, first, last, j0, j1, c, start_k, start_q, n_q, n_k - n_q, batch, flat
        )  # fmt: skip
    else:
        n = count_keys(n_k, 0, step, block, summary, KIND, DILATED)
        s = tile * BLOCK + tl.arange(0, BLOCK)
        j = key_positions(s, 0, step, block, summary, KIND, DILATED)
        first = tile * BLOCK
        last = tl.minimum(first + BLOCK, n) - 1
        j0 = key_positions(first, 0, step, block, summary, KIND, DILATED)
        j1 = key_positions(last, 0, step, block, summary, KIND, DILATED)
        return (
            j, s, s < n, first, last, j0, j1, 0, start_k, start_q, n_q, n_k - n_q, batch, flat
        )  # fmt: skip


@triton.jit
def rows_of_class(c, offset, n_rows, step, CLASSES: tl.constexpr) -> tuple:
    """Return the class of rows that sees the class c of keys: i = i0 + step r, R = R0 + r.

    The numbers i0 and R0 of the first row, and how many there are.
    """
    if CLASSES:
        i0 = c - offset
        i0 -= floor_div(i0, step) * step
        _, R0 = row_class(i0, offset, step, True)
        return i0, R0, tl.maximum(tl.cdiv(n_rows - i0, step), 0)
    else:
        return 0, offset, n_rows


@triton.jit
def seeing_rows(
    s, j, first, last, j0, j1, any_here, c, step, left, right, block, R0, n_rows,
    KIND: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return which rows see a tile of keys: ``seen_keys`` the other way round."""
    low, high = column_bounds(s, j, c, step, left, right, block, KIND, LISTED, CAUSAL)
    low0, high0 = column_bounds(first, j0, c, step, left, right, block, KIND, LISTED, CAUSAL)
    low1, high1 = column_bounds(last, j1, c, step, left, right, block, KIND, LISTED, CAUSAL)
    low0, low1 = tl.maximum(low0, R0), tl.maximum(low1, R0)
    high0, high1 = tl.minimum(high0, R0 + n_rows), tl.minimum(high1, R0 + n_rows)
    high1 = tl.where(any_here, high1, low0)
    edges, whole, more = split_tiles(low0, low1, high0, high1, BLOCK)
    return low, high, low0, edges, whole, more


@triton.jit
def listed_rows(rows_ptr, b, B, low0, offset, any_here, BLOCK: tl.constexpr) -> tuple:
    """Return where a list of rows stands that see everything, how many tokens of it there are,
    how many of them are before the first row that sees a tile of keys, and the tiles of the rest.
    """  # noqa: D205 - four values take two lines
    start, listed = list_range(rows_ptr, b, B)
    skipped = count_up_to(rows_ptr, start, listed, low0 - offset - 1, BLOCK)
    return start, listed, skipped, tl.where(any_here, tl.cdiv(listed - skipped, BLOCK), 0)


@triton.jit
def edge_rows(
    rows_ptr, start, listed, skipped, t, first_R, R0, n_rows, offset, i0, step,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return rows of a tile that is not whole, as first + i, their numbers R, and which exist."""
    i = tl.arange(0, BLOCK)
    if rows_ptr is not None:
        at = skipped + t * BLOCK + i
        is_row = at < listed
        i = tl.load(rows_ptr + start + at, mask=is_row, other=0)
        return 0 * t, i.to(tl.int64), i + offset, is_row
    else:
        R = first_R + i
        first = first_R - R0
        if CLASSES:
            first = i0 + step * first
            i = (step * i).to(tl.int64)
        return first, i, R, n_rows > R - R0


@triton.jit
def load_row_tile(
    q_ptr, dout_ptr, pivot_ptr, delta_ptr, row_flags_ptr, first, rows, is_row, q_stride_t, H,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> tuple:  # fmt: skip
    """Load q, dout, pivot and delta of the rows first + rows.

    All pointers stand at row 0 of the head; is_row is None if all rows exist.
    """
    start = first.to(tl.int64)
    q = load_run(q_ptr, first, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_run(dout_ptr, first, rows, H * DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    pivot = _load_row_values(pivot_ptr + start, rows, is_row, float("inf"))
    delta = _load_row_values(delta_ptr + start, rows, is_row, 0.0)
    if row_flags_ptr is not None:
        flags = _load_row_values(row_flags_ptr + start, rows, is_row, 1)
        pivot = tl.where(flags == 0, pivot, float("inf"))
    return q, dout, pivot, delta


@triton.jit
def _load_row_values(ptr, rows, is_row, other) -> tl.tensor:
    if is_row is None:
        return tl.load(ptr + rows)
    else:
        return tl.load(ptr + rows, mask=is_row, other=other)
