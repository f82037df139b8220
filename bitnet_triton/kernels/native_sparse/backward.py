"""Triton backward of compressed attention (arXiv:2307.08691, algorithm 2): no atomics.

dq: one program a tile of queries. dkdv: one program a tile of compressed keys of one query head,
over the queries that see it; the heads of a group are added up elsewhere, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import load_rows, load_run, score_tile, store_rows
from bitnet_triton.kernels.common.attention_backward import (
    add_dkdv,
    add_dq,
    load_row_tile,
    score_scale,
)
from bitnet_triton.kernels.native_sparse.forward import find_sequence, open_tile, seen_blocks


@triton.jit
def _compressed_attention_bwd_dq_kernel(
    # tensors: q [B Tq H D]; k [B N Hk D]; v [B N Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # dq [B Tq H D]
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, dq_ptr,
    # int32 [B 4], as ``SparseCall.rows`` has them, or None
    rows_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    # sizes and scalars
    B, Tq, before, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    head = tl.program_id(1)
    H = tl.num_programs(1)
    # the last rows see most: they start first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile, start, length, first, position = open_tile(
        rows_ptr, B, tile, tl.program_id(2), Tq, before, BLOCK_M
    )
    if tile * BLOCK_M >= length:
        return
    flat = b.to(tl.int64) if B is None else b.to(tl.int64) * 0
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < length
    row = flat * Tq + start + r
    k_ptr += flat * k_stride_b + first.to(tl.int64) * k_stride_n + head // GROUP * k_stride_h
    v_ptr += flat * v_stride_b + first.to(tl.int64) * v_stride_n + head // GROUP * v_stride_h
    q_at = q_ptr + flat * q_stride_b + head * q_stride_h
    q = load_rows(q_at, start + r, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, row * H + head, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    at_pivot = (flat * H + head) * Tq + start + r
    pivot = tl.load(pivot_ptr + at_pivot, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + at_pivot, mask=is_row, other=0.0)

    n = seen_blocks(position + r, BLOCK, STRIDE)
    last = position + tl.minimum(tile * BLOCK_M + BLOCK_M, length) - 1
    seen = seen_blocks(last, BLOCK, STRIDE)
    # tiles of keys that every row sees need no mask
    whole = seen_blocks(position + tile * BLOCK_M, BLOCK, STRIDE) // BLOCK_N
    lanes = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for t in range(whole):
        k = load_run(k_ptr, t * BLOCK_N, lanes, k_stride_n, None, D, BLOCK_D)
        v = load_run(v_ptr, t * BLOCK_N, lanes, v_stride_n, None, DV, BLOCK_DV)
        scores, slope = score_tile(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
        acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, None)
    for t in range(whole, tl.cdiv(seen, BLOCK_N)):
        i = t * BLOCK_N + lanes
        k = load_run(k_ptr, t * BLOCK_N, lanes, k_stride_n, i < seen, D, BLOCK_D)
        v = load_run(v_ptr, t * BLOCK_N, lanes, v_stride_n, i < seen, DV, BLOCK_DV)
        scores, slope = score_tile(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
        visible = i[None, :] < n[:, None]
        acc = add_dq(acc, scores, slope, dout, pivot, delta, k, v, visible)
    acc *= score_scale(scale_log2, None)
    store_rows(dq_ptr, row * H + head, D, acc, is_row, D, BLOCK_D)


@triton.jit
def _compressed_attention_bwd_dkdv_kernel(
    # tensors: q [B Tq H D]; k [B N Hk D]; v [B N Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # dk [B N H D], dv [B N H DV]
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, dk_ptr, dv_ptr,
    # int32 [B 4], as ``SparseCall.rows`` has them, or None; how many compressed keys there are
    rows_ptr, counts_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    # sizes and scalars
    B, Tq, N, before, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    head = tl.program_id(1)
    H = tl.num_programs(1)
    tile = tl.program_id(0)
    b = tl.program_id(2)
    start = tile * 0
    length = Tq
    first = tile * 0
    count = N
    position = before
    if rows_ptr is not None:
        if B is not None:
            b, tile = find_sequence(rows_ptr, B, tile, 2, BLOCK_N)
        start = tl.load(rows_ptr + 4 * b)
        length = tl.load(rows_ptr + 4 * b + 1)
        first = tl.load(rows_ptr + 4 * b + 2)
        position = tl.load(rows_ptr + 4 * b + 3)
        count = tl.load(counts_ptr + b)
    if tile * BLOCK_N >= count:
        return
    flat = b.to(tl.int64) if B is None else b.to(tl.int64) * 0
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = i < count
    k_at = k_ptr + flat * k_stride_b + head // GROUP * k_stride_h
    v_at = v_ptr + flat * v_stride_b + head // GROUP * v_stride_h
    k = load_rows(k_at, first + i, k_stride_n, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_at, first + i, v_stride_n, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    # the first row that sees a key; all behind it do
    low = tl.where(is_key, i * STRIDE + BLOCK - 1 - position, length)
    begin = tl.maximum(tile * BLOCK_N * STRIDE + BLOCK - 1 - position, 0)
    q_ptr += flat * q_stride_b + start.to(tl.int64) * q_stride_t + head * q_stride_h
    at_head = (flat * Tq + start) * H + head
    at_pivot = (flat * H + head) * Tq + start
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # from here on rows see every key; the last ones may be fewer than a tile
    edges = tl.cdiv(BLOCK_N * STRIDE, BLOCK_M)
    tiles = tl.cdiv(tl.maximum(length - begin, 0), BLOCK_M)
    whole = tl.maximum((length - begin) // BLOCK_M - edges, 0)
    lanes = tl.arange(0, BLOCK_M)
    q_ptr += begin.to(tl.int64) * q_stride_t
    at_head += begin * H
    at_pivot += begin
    for t in range(tl.minimum(edges, tiles) + tl.maximum(tiles - edges - whole, 0)):
        m = tl.where(t < edges, t, t + whole) * BLOCK_M
        is_row = begin + m + lanes < length
        q, dout, pivot, delta = load_row_tile(
            q_ptr, dout_ptr + at_head * DV, pivot_ptr + at_pivot, delta_ptr + at_pivot, None,
            m, lanes, is_row, q_stride_t, H, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        scores, slope = score_tile(k, q, scale_log2, None)  # [BLOCK_N, BLOCK_M]
        visible = (begin + m + lanes)[None, :] >= low[:, None]
        dk, dv = add_dkdv(dk, dv, scores, slope, q, dout, pivot, delta, v, visible)
    for t in range(edges, edges + whole):
        q, dout, pivot, delta = load_row_tile(
            q_ptr, dout_ptr + at_head * DV, pivot_ptr + at_pivot, delta_ptr + at_pivot, None,
            t * BLOCK_M, lanes, None, q_stride_t, H, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        scores, slope = score_tile(k, q, scale_log2, None)  # [BLOCK_N, BLOCK_M]
        dk, dv = add_dkdv(dk, dv, scores, slope, q, dout, pivot, delta, v, None)
    dk *= score_scale(scale_log2, None)
    at = (flat * N + first + i) * H + head
    store_rows(dk_ptr, at, D, dk, is_key, D, BLOCK_D)
    store_rows(dv_ptr, at, DV, dv, is_key, DV, BLOCK_DV)
