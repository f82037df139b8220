"""Triton forward of attention. One program attends with one tile of queries of one head.

Tiles of keys that every row sees whole come first, without a mask; then those at the edges; then
the keys that everybody sees (sinks and global tokens), gathered from a list. What no row sees is
never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import (
    CLASS,
    accumulate,
    find_tile,
    head_band,
    key_positions,
    listed_keys,
    listed_tile,
    load_keys,
    load_rows,
    open_rows,
    raw_scores,
    seen_keys,
    store_rows,
    visible_tile,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _flash_attention_fwd_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; out [B Tq H DV]; lse [B H Tq]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # int32 list of the keys that everybody sees (``list_range``), flags of all keys; or None
    keys_ptr, key_flags_ptr,
    # rows that see everything: their list in their own launch, else their flags
    rows_ptr, row_flags_ptr,
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
    step, left, right, dilation = head_band(heads_ptr, head)
    b, tile, tiles = find_tile(lengths_ptr, rows_ptr, B, Tq, step, 1, BLOCK_M)
    if tile >= tiles:
        return
    # the last rows see most: they start first
    rows, p, R, is_row, first, last, c, start_k, n_k, batch, flat = open_rows(
        lengths_ptr, rows_ptr, row_flags_ptr, b, tiles - 1 - tile, B, Tq, Tk, step, DILATED, BLOCK_M
    )
    if key_flags_ptr is not None:
        key_flags_ptr += flat * Tk + start_k
    k_ptr += batch * k_stride_b + start_k.to(tl.int64) * k_stride_t + head // GROUP * k_stride_h
    v_ptr += batch * v_stride_b + start_k.to(tl.int64) * v_stride_t + head // GROUP * v_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    n, low, high, low0, edges, whole, more = seen_keys(
        R, is_row, first, last, c, step, left, right, n_k, block, summary, sinks,
        KIND, DILATED, BLOCK_N,
    )  # fmt: skip
    if (key_flags_ptr is not None) or (KIND != CLASS and DILATED):
        edges, whole, more = edges + whole + more, 0, 0

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
        scores = tl.where(visible, scores, float("-inf"))
        acc, top, total = accumulate(acc, top, total, scores, factor, v)

    if keys_ptr is not None:
        start, listed = listed_keys(keys_ptr, b, B, p, is_row, CAUSAL, BLOCK_E)
        for t in range(0, listed, BLOCK_E):
            j, is_key, visible = listed_tile(keys_ptr, start, t, listed, p, CAUSAL, BLOCK_E)
            k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_E, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_E, BLOCK_DV]
            scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_E]
            scores = tl.where(visible, scores, float("-inf"))
            acc, top, total = accumulate(acc, top, total, scores, factor, v)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at_row = (flat * Tq + rows) * H + head
    store_rows(out_ptr, at_row, DV, out, is_row, DV, BLOCK_DV)
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    lse = (top * factor + tl.log2(total)) * _LN_2
    tl.store(lse_ptr + (flat * H + head) * Tq + rows, lse, mask=is_row)
