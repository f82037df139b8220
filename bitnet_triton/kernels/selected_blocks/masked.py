"""Triton forward over chosen blocks that are many and small, on a CPU: dense tiles and a mask.

A program takes neighbouring tokens of one key head, with all heads that share it as rows. It marks
the keys that each token has chosen, a byte for each, and goes once over all keys up to its last
token: what nobody marked is multiplied too. That costs what dense attention costs whatever the
lists hold, and is less than lists turned around cost once they name a good part of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    accumulate,
    load_rows,
    load_run,
    raw_scores,
    store_rows,
)
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.tiles import open_group, query_place
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles

# bytes of the marks of programs that run together
_MEMORY = 1 << 26
# entries of a list that are marked at a time
_ENTRIES = 64
# what an entry of a list that is turned around costs, in keys of a dense tile; and the largest
# block of which that, not the products, is most
_KEYS_OF_ENTRY, _LARGEST_BLOCK = 24, 8

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mark_keys(
    marks_ptr, indices_ptr, starts_ptr, ends_ptr, width, indices_stride_t, batch, t0, t1, Tq, Tk,
    S, block, CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write which keys the tokens from t0 on see [t1 - t0, width]; return one past the last key."""
    _, end, p = query_place(starts_ptr, ends_ptr, batch, t1 - 1, Tq, Tk, PACKED)
    last = tl.minimum(end, p + 1) if CAUSAL else end
    lanes = tl.arange(0, BLOCK_B)
    entries = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_N)
    for t in range(t0, t1):
        for j0 in range(0, last, BLOCK_N):
            tl.store(marks_ptr + j0 + columns, tl.zeros((BLOCK_N,), tl.int8))
        start, end, p = query_place(starts_ptr, ends_ptr, batch, t, Tq, Tk, PACKED)
        blocks = tl.where(p >= start, tl.cdiv(end - start, block), 0)
        stop = tl.minimum(end, p + 1) if CAUSAL else end
        list_ptr = indices_ptr + t * indices_stride_t
        for s in range(0, S, BLOCK_S):
            n = tl.load(list_ptr + s + entries, mask=s + entries < S, other=-1)
            # n * block overflows for numbers behind the last block
            is_block = (n >= 0) & (n < blocks)
            j = (start + tl.where(is_block, n, 0) * block)[:, None] + lanes[None, :]
            is_seen = (is_block[:, None] & (lanes < block)[None, :]) & (j < stop)
            tl.store(marks_ptr + j, tl.full((BLOCK_S, BLOCK_B), 1, tl.int8), mask=is_seen)
        marks_ptr += width
    return last


@triton.jit
def _selected_blocks_fwd_masked_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; indices [B Tq Hk S]; out [B Tq H DV];
    # lse [B H Tq]; marks int8 [programs chunk width]
    q_ptr, k_ptr, v_ptr, indices_ptr, out_ptr, lse_ptr, marks_ptr,
    # int32 [B], or [Tq] of packed sequences, or None: the first valid key, one past the last one
    starts_ptr, ends_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, indices_stride_b, indices_stride_t, indices_stride_h,
    # sizes and scalars: the first group of this launch, groups of a row, tokens of a group
    first, groups, chunk, Hk, Tq, Tk, S, block, width, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    _, batch, key_head, t0, t1 = open_group(first, groups, Hk, Tq, chunk)
    H = Hk * GROUP
    indices_ptr += batch * indices_stride_b + key_head * indices_stride_h
    marks_ptr += tl.program_id(0).to(tl.int64) * chunk * width
    last = _mark_keys(
        marks_ptr, indices_ptr, starts_ptr, ends_ptr, width, indices_stride_t, batch, t0, t1, Tq,
        Tk, S, block, CAUSAL, PACKED, BLOCK_S, BLOCK_B, BLOCK_N,
    )  # fmt: skip

    m = tl.arange(0, BLOCK_M)
    i = m // GROUP
    is_row = (i < chunk) & (t0 + i < t1)
    i = tl.where(is_row, i, 0)
    q_ptr += batch * q_stride_b + t0 * q_stride_t + key_head * GROUP * q_stride_h
    q = load_rows(q_ptr, i * q_stride_t + m % GROUP * q_stride_h, 1, is_row, D, BLOCK_D)
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for j0 in range(0, last, BLOCK_N):
        marks = tl.load(marks_ptr + i[:, None] * width + j0 + lanes[None, :])  # [BLOCK_M, BLOCK_N]
        # what nobody has chosen is not read: it may be no number
        is_key = tl.max(marks, axis=0) > 0
        k = load_run(k_ptr, j0, lanes, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_run(v_ptr, j0, lanes, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        scores, factor = raw_scores(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(marks > 0, scores, float("-inf"))
        acc, top, total = accumulate(acc, top, total, scores, factor, v)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    t = t0 + i
    head = key_head * GROUP + m % GROUP
    store_rows(out_ptr, (batch * Tq + t) * H + head, DV, out, is_row, DV, BLOCK_DV)
    lse = (top * scale_log2 + tl.log2(total)) * _LN_2
    tl.store(lse_ptr + (batch * H + head) * Tq + t, lse, mask=is_row)


def launch_masked(
    q: Tensor, k: Tensor, v: Tensor, call: SelectedCall,
    spans: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Map q, k, v to out and lse; ``spans``: starts and ends of keys. Lists lie side by side."""
    (B, Tq, H, D), (Tk, Hk), DV = q.shape, k.shape[1:3], v.shape[-1]
    group, indices = H // Hk, call.indices
    config = dict(tiles("selected_blocks_fwd_masked", head_size(max(D, DV), q.dtype), q.device))
    config["BLOCK_M"] = max(config["BLOCK_M"], triton.next_power_of_2(group))
    chunk = config["BLOCK_M"] // group
    groups, width = cdiv(Tq, chunk), cdiv(Tk, config["BLOCK_N"]) * config["BLOCK_N"]
    programs = B * Hk * groups
    at_once = min(programs, max(_MEMORY // (chunk * width), 1))
    out = torch.empty((B, Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    marks = torch.empty((at_once, chunk, width), dtype=torch.int8, device=q.device)
    for first in range(0, programs, at_once):
        launch(_selected_blocks_fwd_masked_kernel, (min(at_once, programs - first),))(
            q, k, v, indices, out, lse, marks,
            *spans,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride()[:3],
            first, groups, chunk, Hk, Tq, Tk, indices.shape[-1], call.block, width,
            score_factors(call.scale, None)[0],
            GROUP=group, D=D, DV=DV, CAUSAL=call.causal, PACKED=call.cu_seqlens is not None,
            BLOCK_S=min(triton.next_power_of_2(indices.shape[-1]), _ENTRIES),
            BLOCK_B=triton.next_power_of_2(call.block), **config,
        )  # fmt: skip
    return out, lse


def prefers_mask(k: Tensor, call: SelectedCall) -> bool:
    """Tell, by shapes alone, whether to go over all keys costs less than to turn lists around."""
    listed = call.indices.shape[-1]
    return call.block <= _LARGEST_BLOCK and listed * _KEYS_OF_ENTRY > k.shape[1]
