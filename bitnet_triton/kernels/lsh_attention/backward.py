"""Triton backward of bucket_attention (arXiv:2307.08691, algorithm 2), deterministic: no atomics.

Rounds follow one another, as in the forward. dq: a program takes a tile of the order of a round
and adds to what its tokens have from the rounds before; dkdv: likewise from the side of the keys.
The last kernel takes the gradient of keys through their normalisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, store_rows
from bitnet_triton.kernels.common.attention_backward import add_dkdv, add_dq
from bitnet_triton.kernels.flash_attention.launch import launch_delta
from bitnet_triton.kernels.lsh_attention.arguments import BucketCall
from bitnet_triton.kernels.lsh_attention.forward import LOG2_E
from bitnet_triton.kernels.lsh_attention.tiles import not_found_before, open_tile, seen_places
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles


@triton.jit
def _lsh_attention_bwd_dq_kernel(
    # tensors: qk [B T H D]; v [B T H DV]; inverse [B H T]; dout [B T H DV]; pivot, delta [B H T];
    # dq [B T H D] float32
    qk_ptr, v_ptr, inverse_ptr, dout_ptr, pivot_ptr, delta_ptr, dq_ptr,
    # int32 [R B H T]: tokens by place, places of tokens, first and last place that a token sees
    order_ptr, rank_ptr, low_ptr, high_ptr,
    # strides, in elements
    qk_stride_b, qk_stride_t, qk_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars: where this round starts among the places of all
    T, at_round, scale_log2,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    H, head, batch = tl.num_programs(1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head = (batch * H + head) * T
    of_round = tl.num_programs(2).to(tl.int64) * H * T
    order_ptr += of_head + at_round
    i, exists = open_tile(order_ptr, T, BLOCK_M)
    is_row, low, high, start, stop = seen_places(
        low_ptr + of_head + at_round, high_ptr + of_head + at_round, i, exists, T
    )
    qk_ptr += batch * qk_stride_b + head * qk_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    q = load_rows(qk_ptr, i, qk_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    at_row = (batch * T + i) * H + head
    dout = load_rows(dout_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    pivot = tl.load(pivot_ptr + of_head + i, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + of_head + i, mask=is_row, other=0.0)

    acc = load_rows(dq_ptr, at_row, D, is_row & (at_round > 0), D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    for n in range(start, stop, BLOCK_N):
        s = n + tl.arange(0, BLOCK_N)
        is_key = s < stop
        j = tl.load(order_ptr + s, mask=is_key, other=0)
        k = load_rows(qk_ptr, j, qk_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        inverse = tl.load(inverse_ptr + of_head + j, mask=is_key, other=0.0)
        visible = (s[None, :] >= low[:, None]) & (s[None, :] <= high[:, None])
        visible = visible & (i[:, None] != j[None, :])
        visible = not_found_before(
            visible, rank_ptr + of_head, low_ptr + of_head, high_ptr + of_head, of_round,
            i, is_row, j, is_key, at_round,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores *= (inverse * scale_log2)[None, :]
        acc = add_dq(acc, scores, inverse[None, :], dout, pivot, delta, k, v, visible)
    store_rows(dq_ptr, at_row, D, acc, exists, D, BLOCK_D)


@triton.jit
def _lsh_attention_bwd_dkdv_kernel(
    # tensors: as for dq; dk [B T H D] and dv [B T H DV], float32
    qk_ptr, v_ptr, inverse_ptr, dout_ptr, pivot_ptr, delta_ptr, dk_ptr, dv_ptr,
    # int32 [R B H T]: tokens by place, places of tokens, first and last place that sees a token
    order_ptr, rank_ptr, first_ptr, last_ptr,
    # strides, in elements
    qk_stride_b, qk_stride_t, qk_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars: where this round starts among the places of all
    T, at_round, scale_log2,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    H, head, batch = tl.num_programs(1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head = (batch * H + head) * T
    of_round = tl.num_programs(2).to(tl.int64) * H * T
    order_ptr += of_head + at_round
    j, exists = open_tile(order_ptr, T, BLOCK_N)
    is_key, first, last, start, stop = seen_places(
        first_ptr + of_head + at_round, last_ptr + of_head + at_round, j, exists, T
    )
    qk_ptr += batch * qk_stride_b + head * qk_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    k = load_rows(qk_ptr, j, qk_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    inverse = tl.load(inverse_ptr + of_head + j, mask=is_key, other=0.0)

    at_key = (batch * T + j) * H + head
    goes_on = is_key & (at_round > 0)
    dk = load_rows(dk_ptr, at_key, D, goes_on, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    dv = load_rows(dv_ptr, at_key, DV, goes_on, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    for n in range(start, stop, BLOCK_M):
        s = n + tl.arange(0, BLOCK_M)
        is_row = s < stop
        i = tl.load(order_ptr + s, mask=is_row, other=0)
        q = load_rows(qk_ptr, i, qk_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        at_row = (batch * T + i) * H + head
        dout = load_rows(dout_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        pivot = tl.load(pivot_ptr + of_head + i, mask=is_row, other=float("inf"))
        delta = tl.load(delta_ptr + of_head + i, mask=is_row, other=0.0)
        visible = (s[None, :] >= first[:, None]) & (s[None, :] <= last[:, None])
        visible = visible & (i[None, :] != j[:, None])
        visible = not_found_before(
            visible, rank_ptr + of_head, first_ptr + of_head, last_ptr + of_head, of_round,
            j, is_key, i, is_row, at_round,
        )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        scores *= (inverse * scale_log2)[:, None]
        dk, dv = add_dkdv(dk, dv, scores, 1.0, q, dout, pivot, delta, v, visible)
    store_rows(dk_ptr, at_key, D, dk, exists, D, BLOCK_D)
    store_rows(dv_ptr, at_key, DV, dv, exists, DV, BLOCK_DV)


@triton.jit
def _lsh_attention_bwd_rows_kernel(
    # tensors: qk [B T H D]; inverse, lse [B H T]; dout [B T H DV]; dq, dk and dv, float32; and what
    # becomes of them: dqk [B T H D] and dvalues [B T H DV]
    qk_ptr, inverse_ptr, lse_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, dqk_ptr, dvalues_ptr,
    # int32 [R B H T]: T for padding
    low_ptr,
    # strides, in elements
    qk_stride_b, qk_stride_t, qk_stride_h,
    # sizes and scalars
    T, scale,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Put together the gradient of tokens: k = q / |q| gives dq += (dk - k (k . dk)) / |q|."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    H, head, batch = tl.num_programs(1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head = (batch * H + head) * T
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = t < T
    low = tl.load(low_ptr + of_head + t, mask=is_row, other=T)
    at_row = (batch * T + t) * H + head
    q = load_rows(
        qk_ptr + batch * qk_stride_b + head * qk_stride_h,
        t,
        qk_stride_t,
        is_row & (low < T),
        D,
        BLOCK_D,
    )  # [BLOCK_M, BLOCK_D]
    inverse = tl.load(inverse_ptr + of_head + t, mask=is_row, other=0.0)[:, None]
    k = q.to(tl.float32) * inverse
    dk = load_rows(dk_ptr, at_row, D, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dq = load_rows(dq_ptr, at_row, D, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dq += (dk - k * tl.sum(k * dk, 1)[:, None]) * inverse
    store_rows(dqk_ptr, at_row, D, dq * scale, is_row, D, BLOCK_D)

    # a token that has seen only itself gave its value
    lse = tl.load(lse_ptr + of_head + t, mask=is_row, other=0.0)
    alone = is_row & (lse == float("-inf")) & (low < T)
    dout = load_rows(dout_ptr, at_row, DV, alone, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    dv = load_rows(dv_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    store_rows(dvalues_ptr, at_row, DV, dv + dout.to(tl.float32), is_row, DV, BLOCK_DV)


def launch_backward(
    dout: Tensor, qk: Tensor, v: Tensor, inverse: Tensor, out: Tensor, lse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    """Return dqk [B T H D] and dv [B T H Dv], contiguous, in the dtype of the inputs."""
    (B, T, H, D), Dv, rounds = qk.shape, v.shape[-1], call.rank.shape[0]
    pivot, delta = launch_delta(dout, None, out, lse)
    dq, dk = (torch.empty((B, T, H, D), dtype=torch.float32, device=v.device) for _ in range(2))
    dv = torch.empty((B, T, H, Dv), dtype=torch.float32, device=v.device)
    size = head_size(max(D, Dv), qk.dtype)
    shared = (qk, v, inverse, dout, pivot, delta)
    numbers = (*qk.stride()[:3], *v.stride()[:3], T)
    of_dq, of_dkdv = (tiles(f"lsh_attention_bwd_{name}", size, v.device) for name in ("dq", "dkdv"))
    for r in range(rounds):
        launch(_lsh_attention_bwd_dq_kernel, (cdiv(T, of_dq["BLOCK_M"]), H, B))(
            *shared, dq, call.order, call.rank, call.low, call.high,
            *numbers, r * lse.numel(), call.scale * LOG2_E, D=D, DV=Dv, **of_dq,
        )  # fmt: skip
        launch(_lsh_attention_bwd_dkdv_kernel, (cdiv(T, of_dkdv["BLOCK_N"]), H, B))(
            *shared, dk, dv, call.order, call.rank, call.first, call.ahead,
            *numbers, r * lse.numel(), call.scale * LOG2_E, D=D, DV=Dv, **of_dkdv,
        )  # fmt: skip
    dqk = torch.empty(dq.shape, dtype=qk.dtype, device=qk.device)
    dvalues = torch.empty(dv.shape, dtype=v.dtype, device=v.device)
    config = tiles("lsh_attention_bwd_rows", max(D, Dv), v.device)
    launch(_lsh_attention_bwd_rows_kernel, (cdiv(T, config["BLOCK_M"]), H, B))(
        qk, inverse, lse, dout, dq, dk, dv, dqk, dvalues, call.low,
        *qk.stride()[:3], T, call.scale, D=D, DV=Dv, **config,
    )  # fmt: skip
    return dqk, dvalues
