"""Triton backward of exact attention.

That of ``flash_attention`` without whole tiles: each pair is compared with the cut of its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import (
    CLASS,
    find_tile,
    head_band,
    key_positions,
    listed_keys,
    listed_tile,
    load_keys,
    load_rows,
    open_rows,
    score_tile,
    seen_keys,
    store_rows,
    visible_tile,
)
from bitnet_triton.kernels.common.attention_backward import (
    add_dkdv,
    add_dq,
    edge_rows,
    listed_rows,
    load_row_tile,
    open_keys,
    rows_of_class,
    score_scale,
    seeing_rows,
)
from bitnet_triton.kernels.exact_attention.order import is_taken


@triton.jit
def _exact_attention_bwd_dq_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # cuts as in the forward; dq [B Tq H D]
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, cuts_ptr, dq_ptr,
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
    rows, p, R, is_row, first, last, c, start_k, n_k, batch, flat = open_rows(
        lengths_ptr, rows_ptr, row_flags_ptr, b, tiles - 1 - tile, B, Tq, Tk, step, DILATED, BLOCK_M
    )
    if key_flags_ptr is not None:
        key_flags_ptr += flat * Tk + start_k
    k_ptr += batch * k_stride_b + start_k.to(tl.int64) * k_stride_t + head // GROUP * k_stride_h
    v_ptr += batch * v_stride_b + start_k.to(tl.int64) * v_stride_t + head // GROUP * v_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    at_row = (flat * Tq + rows) * H + head
    q = load_rows(q_ptr, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    at_pivot = (flat * H + head) * Tq + rows
    pivot = tl.load(pivot_ptr + at_pivot, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + at_pivot, mask=is_row, other=0.0)
    cut = tl.load(cuts_ptr + at_pivot, mask=is_row, other=0)

    n, low, high, low0, edges, whole, more = seen_keys(
        R, is_row, first, last, c, step, left, right, n_k, block, summary, sinks,
        KIND, DILATED, BLOCK_N,
    )  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for t in range(edges + whole + more):
        first_s = low0 + t * BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        s = first_s + lanes
        j = key_positions(s, c, step, block, summary, KIND, DILATED)
        k = load_keys(k_ptr, first_s, lanes, j, k_stride_t, s < n, D, BLOCK_D, KIND, DILATED)
        v = load_keys(v_ptr, first_s, lanes, j, v_stride_t, s < n, DV, BLOCK_DV, KIND, DILATED)
        visible = visible_tile(s, low, high, p, j, dilation, key_flags_ptr, s < n, KIND, DILATED)
        scores, slope = score_tile(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_N]
        visible = visible & is_taken(scores, j[None, :], cut[:, None])
        acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, visible)

    if keys_ptr is not None:
        start, listed = listed_keys(keys_ptr, b, B, p, is_row, CAUSAL, BLOCK_E)
        for t in range(0, listed, BLOCK_E):
            j, is_key, visible = listed_tile(keys_ptr, start, t, listed, p, CAUSAL, BLOCK_E)
            k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_E, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_E, BLOCK_DV]
            scores, slope = score_tile(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_E]
            visible = visible & is_taken(scores, j[None, :], cut[:, None])
            acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, visible)

    acc *= score_scale(scale_log2, softcap_log2)
    store_rows(dq_ptr, at_row, D, acc, is_row, D, BLOCK_D)


@triton.jit
def _exact_attention_bwd_dkdv_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # cuts as in the forward; dk, dv as k, v but contiguous: what is in them counts
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, cuts_ptr, dk_ptr, dv_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # keys that everybody sees: their list in their own launch, else their flags
    keys_ptr, key_flags_ptr,
    # rows that see everything: the same
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
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    # query heads of a group share their classes
    step = tl.load(heads_ptr + 4 * key_head * GROUP)
    b, tile, tiles = find_tile(lengths_ptr, keys_ptr, B, Tk, step, 3, BLOCK_N)
    if tile >= tiles:
        return
    j, s, is_key, first, last, j0, j1, c, start_k, start_q, n_q, offset, batch, flat = open_keys(
        lengths_ptr, keys_ptr, b, tile, B, Tq, Tk, step, block, summary, KIND, DILATED, BLOCK_N
    )
    if KIND != CLASS:  # noqa: SIM102 - the compiler knows
        if last < first:
            return
    keys = start_k + j
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    k = load_rows(k_ptr, keys, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, keys, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    # keys that everybody sees get all their gradient elsewhere
    is_here = is_key
    if sinks is not None:
        is_here = is_here & (j >= sinks)
    if key_flags_ptr is not None:
        is_here = is_here & (tl.load(key_flags_ptr + flat * Tk + keys, mask=is_key, other=1) == 0)
    any_here = tl.max(is_here.to(tl.int32), 0) > 0
    CLASSES: tl.constexpr = DILATED and KIND == CLASS
    i0, R0, n_rows = rows_of_class(c, offset, n_q, step, CLASSES)
    q_ptr += batch * q_stride_b + start_q.to(tl.int64) * q_stride_t
    if row_flags_ptr is not None:
        row_flags_ptr += flat * Tq + start_q

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(GROUP):
        head = key_head * GROUP + g
        _, left, right, dilation = head_band(heads_ptr, head)
        low, high, low0, edges, whole, more = seeing_rows(
            s, j, first, last, j0, j1, any_here, c, step, left, right, block, R0, n_rows,
            KIND, keys_ptr is not None, CAUSAL, BLOCK_M,
        )  # fmt: skip
        tiles = edges + whole + more
        start = 0
        skipped = 0
        listed = 0
        if rows_ptr is not None:
            start, listed, skipped, tiles = listed_rows(
                rows_ptr, b, B, low0, offset, any_here, BLOCK_M
            )

        at_head = (flat * Tq + start_q) * H + head
        at_pivot = (flat * H + head) * Tq + start_q
        for t in range(tiles):
            first_R = low0 + t * BLOCK_M
            first_i, i, R, is_row = edge_rows(
                rows_ptr, start, listed, skipped, t, first_R, R0, n_rows, offset, i0, step,
                CLASSES, BLOCK_M,
            )  # fmt: skip
            q, dout, pivot, delta = load_row_tile(
                q_ptr + head * q_stride_h, dout_ptr + at_head * DV, pivot_ptr + at_pivot,
                delta_ptr + at_pivot, row_flags_ptr, first_i, i, is_row, q_stride_t, H,
                D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            visible = (R[None, :] >= low[:, None]) & (R[None, :] < high[:, None])
            if KIND != CLASS and DILATED:
                visible = visible & ((R[None, :] - j[:, None]) % dilation == 0)
            cut = tl.load(cuts_ptr + at_pivot + first_i + i, mask=is_row, other=0)
            scores, slope = score_tile(k, q, scale_log2, softcap_log2)  # [BLOCK_N, BLOCK_M]
            visible = visible & is_taken(scores, j[:, None], cut[None, :])
            dk, dv = add_dkdv(dk, dv, scores, slope, q, dout, pivot, delta, v, visible)

    dk = tl.where(is_here[:, None], dk * score_scale(scale_log2, softcap_log2), 0.0)
    dv = tl.where(is_here[:, None], dv, 0.0)
    at_key = (flat * Tk + keys) * tl.num_programs(1) + key_head
    dk += load_rows(dk_ptr, at_key, D, is_key, D, BLOCK_D)
    dv += load_rows(dv_ptr, at_key, DV, is_key, DV, BLOCK_DV)
    store_rows(dk_ptr, at_key, D, dk, is_key, D, BLOCK_D)
    store_rows(dv_ptr, at_key, DV, dv, is_key, DV, BLOCK_DV)
