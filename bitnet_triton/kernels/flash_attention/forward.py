"""Triton forward of attention. One program attends with one tile of queries of one head.

Tiles of keys that every row sees whole come first, without a mask; then those at the edges; then
the keys that everybody sees (sinks and global tokens), gathered from a list. What no row sees is
never loaded.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from bitnet_triton.kernels.flash_attention.tiles import (
    count_keys,
    count_up_to,
    find_rows,
    find_tile,
    is_taken,
    key_positions,
    list_range,
    load_keys,
    load_rows,
    raw_scores,
    row_bounds,
    sequence_lengths,
    split_tiles,
    store_rows,
    visible_tile,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(top, total, scores, factor) -> tuple:
    """Take a tile of scores, in base 2 times a positive factor, into the running softmax
    (arXiv:1805.02867).

    Returns the weights of the tile, by how much what was summed before shrinks, the new maximum of
    the scores and the new sum of weights.
    """  # noqa: D205 - what scores are takes two lines
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key keeps a finite pivot: -inf - -inf is NaN
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * factor
    weights = tl.exp2(scores * factor - pivot[:, None])
    shrink = tl.exp2(top * factor - pivot)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def accumulate(acc, top, total, scores, factor, v) -> tuple:
    """Add a tile of keys to what a tile of rows has summed."""
    weights, shrink, top, total = softmax_step(top, total, scores, factor)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, top, total


@triton.jit
def _flash_attention_fwd_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; out [B Tq H DV]; lse [B H Tq]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # keys that everybody sees: the list, where sequences start in it, flags of all keys; or None
    keys_ptr, keys_start_ptr, key_flags_ptr,
    # rows that see everything: their list and its starts in their own launch, else their flags
    rows_ptr, rows_start_ptr, row_flags_ptr,
    # int32 [B H tiles]: the tiles of keys that each program loads; int64 [B H Tq]: where rows
    # select by scores, the order of the last pair that each takes; or None
    visited_ptr, cuts_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars; None for what the band has not
    B, Tq, Tk, block, summary, sinks, scale_log2, softcap_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
    DILATED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    BLOCK_E: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N
    head = tl.program_id(1)
    H = tl.num_programs(1)
    step = tl.load(heads_ptr + 4 * head)
    left = tl.load(heads_ptr + 4 * head + 1)
    right = tl.load(heads_ptr + 4 * head + 2)
    dilation = tl.load(heads_ptr + 4 * head + 3)
    b, tile, tiles = find_tile(lengths_ptr, rows_start_ptr, B, Tq, step, 1, BLOCK_M)
    if tile >= tiles:
        return
    # the last rows see most: they start first
    tile = tiles - 1 - tile

    start_q, n_q, start_k, n_k = sequence_lengths(lengths_ptr, b, Tq, Tk)
    i, R, c, is_row, first, last = find_rows(
        rows_ptr, rows_start_ptr, b, tile, n_q, n_k - n_q, step, DILATED, BLOCK_M
    )
    p = i + (n_k - n_q)
    batch = b.to(tl.int64)
    flat = batch * 0 if B is not None else batch
    rows = start_q + i
    if row_flags_ptr is not None:
        flags = tl.load(row_flags_ptr + flat * Tq + rows, mask=is_row, other=1)
        is_row = is_row & (flags == 0)
    if key_flags_ptr is not None:
        key_flags_ptr += flat * Tk + start_k
    k_ptr += batch * k_stride_b + start_k.to(tl.int64) * k_stride_t + head // GROUP * k_stride_h
    v_ptr += batch * v_stride_b + start_k.to(tl.int64) * v_stride_t + head // GROUP * v_stride_h
    q = load_rows(
        q_ptr + batch * q_stride_b + head * q_stride_h, rows, q_stride_t, is_row, D, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]

    n = count_keys(n_k, c, step, block, summary, KIND, DILATED)
    low, high = row_bounds(R, c, step, left, right, n, block, summary, sinks, KIND)
    low0, high0 = row_bounds(first, c, step, left, right, n, block, summary, sinks, KIND)
    low1, high1 = row_bounds(last, c, step, left, right, n, block, summary, sinks, KIND)
    # a tile of rows that all belong to another launch has nothing to see
    high1 = tl.where(tl.max(is_row.to(tl.int32), 0) > 0, high1, low0)
    edges, whole, more = split_tiles(low0, low1, high0, high1, BLOCK_N)
    if (key_flags_ptr is not None) or (cuts_ptr is not None) or (KIND != 0 and DILATED):
        edges, whole, more = edges + whole + more, 0, 0
    cut = None
    if cuts_ptr is not None:
        cut = tl.load(cuts_ptr + (flat * H + head) * Tq + rows, mask=is_row, other=0)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for t in range(edges, edges + whole):
        first_s = low0 + t * BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        j = key_positions(first_s + lanes, c, step, block, summary, KIND, DILATED)
        k = load_keys(k_ptr, first_s, lanes, j, k_stride_t, None, D, BLOCK_D, KIND, DILATED)
        v = load_keys(v_ptr, first_s, lanes, j, v_stride_t, None, DV, BLOCK_DV, KIND, DILATED)
        scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_N]
        acc, top, total = accumulate(acc, top, total, scores, factor, v)

    for t in range(edges + more):
        first_s = low0 + tl.where(t < edges, t, t + whole) * BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        s = first_s + lanes
        j = key_positions(s, c, step, block, summary, KIND, DILATED)
        k = load_keys(k_ptr, first_s, lanes, j, k_stride_t, s < n, D, BLOCK_D, KIND, DILATED)
        v = load_keys(v_ptr, first_s, lanes, j, v_stride_t, s < n, DV, BLOCK_DV, KIND, DILATED)
        scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_N]
        visible = visible_tile(s, low, high, p, j, dilation, key_flags_ptr, s < n, KIND, DILATED)
        if cut is not None:
            visible = visible & is_taken(scores * factor, j[None, :], cut[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        acc, top, total = accumulate(acc, top, total, scores, factor, v)

    listed = 0
    if keys_ptr is not None:
        start, listed = list_range(keys_start_ptr, b)
        if CAUSAL:
            last_p = tl.max(tl.where(is_row, p, -1), 0)
            listed = count_up_to(keys_ptr, start, listed, last_p, BLOCK_E)
        for t in range(0, listed, BLOCK_E):
            at = t + tl.arange(0, BLOCK_E)
            j = tl.load(keys_ptr + start + at, mask=at < listed, other=0)
            k = load_rows(k_ptr, j, k_stride_t, at < listed, D, BLOCK_D)  # [BLOCK_E, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, at < listed, DV, BLOCK_DV)  # [BLOCK_E, BLOCK_DV]
            scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_E]
            visible = (at < listed)[None, :]
            if CAUSAL:
                visible = visible & (j[None, :] <= p[:, None])
            if cut is not None:
                visible = visible & is_taken(scores * factor, j[None, :], cut[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            acc, top, total = accumulate(acc, top, total, scores, factor, v)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at_row = (flat * Tq + rows) * H + head
    store_rows(out_ptr, at_row, DV, out, is_row, DV, BLOCK_DV)
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    lse = (top * factor + tl.log2(total)) * _LN_2
    tl.store(lse_ptr + (flat * H + head) * Tq + rows, lse, mask=is_row)
    if visited_ptr is not None:
        program = (b * H + head) * tl.num_programs(0) + tl.program_id(0)
        tl.store(visited_ptr + program, edges + whole + more + tl.cdiv(listed, BLOCK_E))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return ``scale_log2`` and ``softcap_log2`` as ``score_tile`` takes them."""
    if softcap is None:
        return scale * math.log2(math.e), None
    return scale / softcap, softcap * math.log2(math.e)
