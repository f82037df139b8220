"""Triton backward over chosen blocks (arXiv:2307.08691, algorithm 2), deterministic: no atomics.

dq: by queries, or by groups of tokens and key blocks, as in the forward. dkdv: a program takes a
block of keys, or a part of its list where many tokens chose it, over all heads that share the keys;
parts are added up in their order by another kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import load_rows, score_tile, store_rows
from bitnet_triton.kernels.common.attention_backward import add_dkdv, add_dq, score_scale
from bitnet_triton.kernels.selected_blocks.tiles import (
    listed_keys,
    open_block,
    open_group,
    query_place,
    row_tile,
)


@triton.jit
def _selected_blocks_bwd_dq_rows_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; indices [B Tq Hk S]; dout [B Tq H DV];
    # pivot, delta [B H Tq]; dq [B Tq H D]
    q_ptr, k_ptr, v_ptr, indices_ptr, dout_ptr, pivot_ptr, delta_ptr, dq_ptr,
    # int32 [B], or [Tq] of packed sequences, or None: the first valid key, one past the last one
    starts_ptr, ends_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, indices_stride_b, indices_stride_t, indices_stride_h,
    # sizes and scalars
    Tq, Tk, S, block, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    t = tl.program_id(0)
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    start, end, p = query_place(starts_ptr, ends_ptr, b, t, Tq, Tk, PACKED)
    indices_ptr += batch * indices_stride_b + t.to(tl.int64) * indices_stride_t
    indices_ptr += key_head * indices_stride_h
    lanes_s = tl.arange(0, BLOCK_S)
    listed = tl.load(indices_ptr + lanes_s, mask=lanes_s < S, other=-1)  # [BLOCK_S]

    m = tl.arange(0, ROWS)
    is_row = m < GROUP
    head = key_head * GROUP + m
    q_ptr += batch * q_stride_b + t.to(tl.int64) * q_stride_t
    q = load_rows(q_ptr, head, q_stride_h, is_row, D, BLOCK_D)  # [ROWS, BLOCK_D]
    at_row = (batch * Tq + t) * H + head
    dout = load_rows(dout_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [ROWS, BLOCK_DV]
    at_pivot = (batch * H + head) * Tq + t
    pivot = tl.load(pivot_ptr + at_pivot, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + at_pivot, mask=is_row, other=0.0)
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    of_block = tl.cdiv(block, BLOCK_N)
    for i in range(S * of_block):
        j, is_key = listed_keys(
            indices_ptr, listed, lanes_s, i // of_block, i % of_block * BLOCK_N, start, end, p,
            block, CAUSAL, BLOCK_N,
        )  # fmt: skip
        k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        scores, slope = score_tile(q, k, scale_log2, None)  # [ROWS, BLOCK_N]
        acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, is_key[None, :])
    store_rows(dq_ptr, at_row, D, acc * score_scale(scale_log2, None), is_row, D, BLOCK_D)


@triton.jit
def _load_tile(
    tokens_ptr, q_ptr, dout_ptr, pivot_ptr, delta_ptr, at, stop, q_stride_t, q_stride_h, H, Tq,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return the tokens and heads of a tile of rows, which exist, and q, dout, pivot and delta.

    All pointers stand at token 0 of the first head that reads the keys.
    """
    t, g, is_row = row_tile(tokens_ptr, at, stop, GROUP, BLOCK_M)
    places = t.to(tl.int64) * q_stride_t + g * q_stride_h
    q = load_rows(q_ptr, places, 1, is_row, D, triton.next_power_of_2(D))  # [BLOCK_M, BLOCK_D]
    at_row = t.to(tl.int64) * H + g
    dout = load_rows(dout_ptr, at_row, DV, is_row, DV, triton.next_power_of_2(DV))
    at_pivot = g.to(tl.int64) * Tq + t
    pivot = tl.load(pivot_ptr + at_pivot, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + at_pivot, mask=is_row, other=0.0)
    return t, g, is_row, q, dout, pivot, delta


@triton.jit
def _selected_blocks_bwd_dq_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # dq [B Tq H D]; acc [programs CHUNK*GROUP D] float32
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, dq_ptr, acc_ptr,
    # int32: tokens by group and block, where each list starts, first and last key of blocks
    tokens_ptr, offsets_ptr, spans_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars: the first group of this launch, groups of a row, blocks of a row; where
    # query 0 stands; tokens of a group
    first, groups, blocks, Hk, Tq, offset, chunk, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    program = tl.program_id(0).to(tl.int64)
    number, batch, key_head, t0, t1 = open_group(first, groups, Hk, Tq, chunk)
    H = Hk * GROUP
    head = key_head * GROUP
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += (batch * Tq * H + head) * DV
    pivot_ptr += (batch * H + head) * Tq
    delta_ptr += (batch * H + head) * Tq
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    acc_ptr += program * chunk * GROUP * D
    n_rows = (t1 - t0).to(tl.int32) * GROUP
    lanes = tl.arange(0, BLOCK_M)
    for r in range(0, n_rows, BLOCK_M):
        zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        store_rows(acc_ptr, r + lanes, D, zeros, r + lanes < n_rows, D, BLOCK_D)

    for n in range(blocks):
        begin, stop, low, high = open_block(offsets_ptr, spans_ptr, number, batch, n, blocks)
        for j0 in range(low, tl.where(begin < stop, high, low), BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            is_key = j < high
            k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            for at in range(begin, stop, BLOCK_M // GROUP):
                t, g, is_row, q, dout, pivot, delta = _load_tile(
                    tokens_ptr, q_ptr, dout_ptr, pivot_ptr, delta_ptr, at, stop,
                    q_stride_t, q_stride_h, H, Tq, GROUP, D, DV, BLOCK_M,
                )  # fmt: skip
                visible = is_key[None, :]
                if CAUSAL:
                    visible = visible & (j[None, :] <= (t + offset)[:, None])
                scores, slope = score_tile(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
                rows = (t - t0.to(tl.int32)) * GROUP + g
                acc = load_rows(acc_ptr, rows, D, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, visible)
                store_rows(acc_ptr, rows, D, acc, is_row, D, BLOCK_D)

    for r in range(0, n_rows, BLOCK_M):
        rows = r + lanes
        acc = load_rows(acc_ptr, rows, D, rows < n_rows, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        at_row = (batch * Tq + t0 + rows // GROUP) * H + head + rows % GROUP
        acc *= score_scale(scale_log2, None)
        store_rows(dq_ptr, at_row, D, acc, rows < n_rows, D, BLOCK_D)


@triton.jit
def _selected_blocks_bwd_dkdv_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # dk, dv as k, v but contiguous; parts of long lists [slots block D + DV] float32
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, dk_ptr, dv_ptr, parts_ptr,
    # int32: tokens by block, where each list starts, first and last key of blocks; of programs:
    # block and part; the slot of the first part of each block
    tokens_ptr, offsets_ptr, spans_ptr, work_ptr, slots_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars: lists, blocks of a row, tokens of a part
    lists, blocks, Hk, Tq, Tk, offset, block, of_part, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    number = tl.load(work_ptr + 2 * tl.program_id(0)).to(tl.int64)
    if number >= lists:
        return
    part = tl.load(work_ptr + 2 * tl.program_id(0) + 1)
    row = number // blocks
    batch = row // Hk
    key_head = row % Hk
    H = Hk * GROUP
    head = key_head * GROUP
    begin, stop, low, high = open_block(
        offsets_ptr, spans_ptr, row, batch, (number % blocks).to(tl.int32), blocks
    )
    is_whole = stop - begin <= of_part
    begin += part * of_part
    stop = tl.minimum(begin + of_part, stop)
    slot = tl.load(slots_ptr + number).to(tl.int64) + part
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += (batch * Tq * H + head) * DV
    pivot_ptr += (batch * H + head) * Tq
    delta_ptr += (batch * H + head) * Tq
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    for j0 in range(low, high, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        is_key = j < high
        k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        for at in range(begin, stop, BLOCK_M // GROUP):
            t, _, is_row, q, dout, pivot, delta = _load_tile(
                tokens_ptr, q_ptr, dout_ptr, pivot_ptr, delta_ptr, at, stop,
                q_stride_t, q_stride_h, H, Tq, GROUP, D, DV, BLOCK_M,
            )  # fmt: skip
            visible = is_row[None, :]
            if CAUSAL:
                visible = visible & (j[:, None] <= (t + offset)[None, :])
            scores, slope = score_tile(k, q, scale_log2, None)  # [BLOCK_N, BLOCK_M]
            dk, dv = add_dkdv(dk, dv, scores, slope, q, dout, pivot, delta, v, visible)
        dk *= score_scale(scale_log2, None)
        at_key = (batch * Tk + j) * Hk + key_head
        store_rows(dk_ptr, at_key, D, dk, is_key & is_whole, D, BLOCK_D)
        store_rows(dv_ptr, at_key, DV, dv, is_key & is_whole, DV, BLOCK_DV)
        at_part = slot * block + (j - low)
        is_part = is_key & (is_whole == 0)
        store_rows(parts_ptr, at_part, D + DV, dk, is_part, D, BLOCK_D)
        store_rows(parts_ptr + D, at_part, D + DV, dv, is_part, DV, BLOCK_DV)


@triton.jit
def _selected_blocks_bwd_sum_kernel(
    # tensors: parts [slots block D + DV] float32; dk [B Tk Hk D]; dv [B Tk Hk DV]
    parts_ptr, dk_ptr, dv_ptr,
    # int32: where each list starts, first and last key of blocks, the slot of the first part
    offsets_ptr, spans_ptr, slots_ptr,
    # sizes
    blocks, Hk, Tk, block, of_part,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the parts of the lists that have several, in their order."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    number = tl.program_id(0).to(tl.int64)
    row = number // blocks
    batch = row // Hk
    begin, stop, low, high = open_block(
        offsets_ptr, spans_ptr, row, batch, (number % blocks).to(tl.int32), blocks
    )
    n = tl.cdiv(stop - begin, of_part)
    if n > 1:
        slot = tl.load(slots_ptr + number).to(tl.int64)
        for j0 in range(low, high, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            is_key = j < high
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
            for i in range(n):
                at_part = (slot + i) * block + (j - low)
                dk += load_rows(parts_ptr, at_part, D + DV, is_key, D, BLOCK_D)
                dv += load_rows(parts_ptr + D, at_part, D + DV, is_key, DV, BLOCK_DV)
            at_key = (batch * Tk + j) * Hk + row % Hk
            store_rows(dk_ptr, at_key, D, dk, is_key, D, BLOCK_D)
            store_rows(dv_ptr, at_key, DV, dv, is_key, DV, BLOCK_DV)
