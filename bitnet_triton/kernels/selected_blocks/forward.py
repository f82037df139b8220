"""Triton forward over chosen blocks by key blocks: for CPUs, where few rows at a time are slow.

A program takes a group of neighbouring tokens of one key head. It goes over the key blocks that any
of them chose, once: a block is loaded, and packed for the products, once for all rows of the group
that chose it, which fill tiles whatever the number of heads that share a key head. What a row has
summed so far waits in memory that fits the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import (
    accumulate,
    load_rows,
    raw_scores,
    store_rows,
)
from bitnet_triton.kernels.selected_blocks.tiles import open_block, open_group, row_tile

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _selected_blocks_fwd_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; out [B Tq H DV]; lse [B H Tq];
    # acc [programs CHUNK*GROUP DV], top and total [programs CHUNK*GROUP], float32
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, acc_ptr, top_ptr, total_ptr,
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
    q_ptr += batch * q_stride_b + t0 * q_stride_t + key_head * GROUP * q_stride_h
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    acc_ptr += program * chunk * GROUP * DV
    top_ptr += program * chunk * GROUP
    total_ptr += program * chunk * GROUP
    n_rows = (t1 - t0).to(tl.int32) * GROUP
    lanes = tl.arange(0, BLOCK_M)
    for r in range(0, n_rows, BLOCK_M):
        rows = r + lanes
        store_rows(
            acc_ptr, rows, DV, tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), rows < n_rows, DV,
            BLOCK_DV,
        )  # fmt: skip
        tl.store(top_ptr + rows, float("-inf"), mask=rows < n_rows)
        tl.store(total_ptr + rows, 0.0, mask=rows < n_rows)

    for n in range(blocks):
        begin, stop, low, high = open_block(offsets_ptr, spans_ptr, number, batch, n, blocks)
        for j0 in range(low, tl.where(begin < stop, high, low), BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            is_key = j < high
            k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            for at in range(begin, stop, BLOCK_M // GROUP):
                t, g, is_row = row_tile(tokens_ptr, at, stop, GROUP, BLOCK_M)
                local = t - t0.to(tl.int32)
                places = local.to(tl.int64) * q_stride_t + g * q_stride_h
                q = load_rows(q_ptr, places, 1, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                scores, factor = raw_scores(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
                visible = is_key[None, :]
                if CAUSAL:
                    visible = visible & (j[None, :] <= (t + offset)[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                rows = local * GROUP + g
                top = tl.load(top_ptr + rows, mask=is_row, other=0.0)
                total = tl.load(total_ptr + rows, mask=is_row, other=0.0)
                acc = load_rows(acc_ptr, rows, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
                acc, top, total = accumulate(acc, top, total, scores, factor, v)
                store_rows(acc_ptr, rows, DV, acc, is_row, DV, BLOCK_DV)
                tl.store(top_ptr + rows, top, mask=is_row)
                tl.store(total_ptr + rows, total, mask=is_row)

    for r in range(0, n_rows, BLOCK_M):
        rows = r + lanes
        is_row = rows < n_rows
        top = tl.load(top_ptr + rows, mask=is_row, other=0.0)
        total = tl.load(total_ptr + rows, mask=is_row, other=0.0)
        acc = load_rows(acc_ptr, rows, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        t = t0 + rows // GROUP
        head = key_head * GROUP + rows % GROUP
        store_rows(out_ptr, (batch * Tq + t) * H + head, DV, out, is_row, DV, BLOCK_DV)
        lse = (top * scale_log2 + tl.log2(total)) * _LN_2
        tl.store(lse_ptr + (batch * H + head) * Tq + t, lse, mask=is_row)
