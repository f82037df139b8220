"""Triton forward of bucket_attention: one program takes a tile of the order of one round.

Rounds follow one another and go on with one softmax: what a tile of tokens has summed lies in
memory between them, and each pair counts in the first round that finds it. Nothing is merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import accumulate, load_rows, store_rows
from bitnet_triton.kernels.lsh_attention.arguments import BucketCall
from bitnet_triton.kernels.lsh_attention.tiles import not_found_before, open_tile, seen_places
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles

_LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634


@triton.jit
def _lsh_attention_fwd_kernel(
    # tensors: qk [B T H D]; v [B T H DV]; inverse [B H T]; out [B T H DV]; lse [B H T]; what is
    # summed: acc [B T H DV], top and total [B H T]; all but qk, v and out in float32
    qk_ptr, v_ptr, inverse_ptr, out_ptr, lse_ptr, acc_ptr, top_ptr, total_ptr,
    # int32 [R B H T]: tokens by place, places of tokens, first and last place that a token sees
    order_ptr, rank_ptr, low_ptr, high_ptr,
    # strides, in elements
    qk_stride_b, qk_stride_t, qk_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars: where this round starts among the places of all, and where they end
    T, at_round, all_rounds, scale_log2,
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
    goes_on = is_row & (at_round > 0)
    acc = load_rows(acc_ptr, at_row, DV, goes_on, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    top = tl.load(top_ptr + of_head + i, mask=goes_on, other=float("-inf"))
    total = tl.load(total_ptr + of_head + i, mask=goes_on, other=0.0)
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
        scores = tl.where(visible, scores * (inverse * scale_log2)[None, :], float("-inf"))
        acc, top, total = accumulate(acc, top, total, scores, 1.0, v)

    if at_round + of_round < all_rounds:
        store_rows(acc_ptr, at_row, DV, acc, is_row, DV, BLOCK_DV)
        tl.store(top_ptr + of_head + i, top, mask=is_row)
        tl.store(total_ptr + of_head + i, total, mask=is_row)
    else:
        # a token that sees nothing else has itself; padding has nothing
        alone = is_row & (total == 0)
        own = load_rows(v_ptr, i, v_stride_t, alone, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        out = acc / tl.where(total > 0, total, 1.0)[:, None] + own.to(tl.float32)
        store_rows(out_ptr, at_row, DV, out, exists, DV, BLOCK_DV)
        tl.store(lse_ptr + of_head + i, (top + tl.log2(total)) * _LN_2, mask=exists)


def launch_forward(
    qk: Tensor, v: Tensor, inverse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    """Map qk [B T H D] and v to out [B T H Dv] in the dtype of ``v``, and lse [B H T].

    The lse leaves out what tokens see of themselves: it is -inf where they see nothing else.
    """
    (B, T, H, D), Dv, rounds = qk.shape, v.shape[-1], call.rank.shape[0]
    out = torch.empty((B, T, H, Dv), dtype=v.dtype, device=v.device)
    lse, top, total = (
        torch.empty((B, H, T), dtype=torch.float32, device=v.device) for _ in range(3)
    )
    acc = torch.empty(out.shape if rounds > 1 else (1,), dtype=torch.float32, device=v.device)
    config = tiles("lsh_attention_fwd", head_size(max(D, Dv), qk.dtype), qk.device)
    for r in range(rounds):
        launch(_lsh_attention_fwd_kernel, (cdiv(T, config["BLOCK_M"]), H, B))(
            qk, v, inverse, out, lse, acc, top, total,
            call.order, call.rank, call.low, call.high,
            *qk.stride()[:3], *v.stride()[:3],
            T, r * lse.numel(), rounds * lse.numel(), call.scale * LOG2_E,
            D=D, DV=Dv, **config,
        )  # fmt: skip
    return out, lse
