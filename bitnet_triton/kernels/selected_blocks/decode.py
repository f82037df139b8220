"""Triton attention over chosen blocks by queries: a program reads one list, or a split of one.

It loads the queries of all heads that share a key head once and meets the blocks of their list one
after the other, in tiles that divide a block. So a GPU computes every forward, and every device a
few queries against a cache: there lists are split over programs, whose results the merge of
``flash_attention`` puts together (Flash-Decoding), and the lengths are read from memory, so that a
launch recorded once serves every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    accumulate,
    load_rows,
    raw_scores,
    softmax_step,
    store_rows,
)
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.decode import launch_merge, num_splits
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.selected_blocks.tiles import listed_keys, query_place
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# up to so many queries their lists are split
MOST_QUERIES = 16

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _selected_blocks_fwd_rows_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; indices [B Tq Hk S]; out [B Tq H N DV]
    # and lse [B Tq H N], of N splits; lse in base 2, or as promised to callers where N is 1
    q_ptr, k_ptr, v_ptr, indices_ptr, out_ptr, lse_ptr,
    # int32 [B], or [Tq] of packed sequences, or None: the first valid key, one past the last one
    starts_ptr, ends_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, indices_stride_b, indices_stride_t, indices_stride_h,
    # sizes and scalars
    Tq, Tk, S, block, scale_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    t = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
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
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    of_block = tl.cdiv(block, BLOCK_N)
    of_split = tl.cdiv(S, SPLITS)
    first_s = split * of_split
    for i in range(tl.minimum(of_split, S - first_s) * of_block):
        s = first_s + i // of_block
        j, is_key = listed_keys(
            indices_ptr, listed, lanes_s, s, i % of_block * BLOCK_N, start, end, p, block,
            CAUSAL, BLOCK_N,
        )  # fmt: skip
        k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        scores, factor = raw_scores(q, k, scale_log2, None)  # [ROWS, BLOCK_N]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        if ROWS <= 4:
            # on a CPU: values are widened as they are read, nothing is packed, weights keep float32
            weights, shrink, top, total = softmax_step(top, total, scores, factor)
            products = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
            acc = acc * shrink[:, None] + products  # [ROWS, BLOCK_DV]
        else:
            acc, top, total = accumulate(acc, top, total, scores, factor, v)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    row = (batch * Tq + t) * H + head
    store_rows(out_ptr, row * SPLITS + split, DV, out, is_row, DV, BLOCK_DV)
    lse = top * scale_log2 + tl.log2(total)
    if SPLITS == 1:
        tl.store(lse_ptr + (batch * H + head) * Tq + t, lse * _LN_2, mask=is_row)
    else:
        tl.store(lse_ptr + row * SPLITS + split, lse, mask=is_row)


def launch_selected_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    block: int,
    scale: float,
    leftpad: Tensor | None = None,
    seqused: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend with a few queries of a row, without checks and only by launches: it can be captured.

    The last query stands at the last key that counts, number ``seqused - 1``; blocks count from
    ``leftpad``. What a step of a mode does, with its memory's ``places``::

        keys, values = (store.transpose(1, 2) for store in memory.stores)
        out, _ = launch_selected_decode(
            q, keys, values, indices, block=64, scale=scale,
            leftpad=places[LEFTPAD], seqused=places[USED],
        )

    Args:
        q: [B Tq H D] with few Tq, last dimension contiguous, as that of all others.
        k: [B Tk Hk D] of any strides, Tk up to the whole capacity of a store.
        v: [B Tk Hk Dv], likewise.
        indices: int32 [B Tq Hk S], written by an earlier launch; as ``selected_block_attention``
            takes it: negative and too large numbers are none, repeated ones count once.
        block: keys of a block.
        scale: positive, multiplies the scores.
        leftpad: int32 [B], the first key of each row that counts; None: 0.
        seqused: int32 [B], one past the last key that counts, at most Tk; None: Tk.
        causal: a query sees the keys up to its own place.

    Returns:
        out [B Tq H Dv] in the dtype of ``q`` and lse [B H Tq] in float32.
    """
    return launch_rows(
        q, k, v, indices, (leftpad, seqused), block=block, scale=scale, causal=causal
    )


def launch_rows(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, spans: tuple[Tensor | None, Tensor | None],
    *, block: int, scale: float, causal: bool, packed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Start the kernel, and the merge where lists are split; ``spans``: starts and ends of keys."""
    (B, Tq, H), (Tk, Hk) = q.shape[:3], k.shape[1:3]
    DV, S = v.shape[-1], indices.shape[-1]
    splits = min(num_splits(S * block, q.device), S) if Tq <= MOST_QUERIES else 1
    out = torch.empty((B, Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((B, Tq, H, splits, DV), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((B, Tq, H, splits), dtype=torch.float32, device=q.device)
    scale_log2, _ = score_factors(scale, None)
    launch(_selected_blocks_fwd_rows_kernel, (Tq * splits, Hk, B))(
        q, k, v, indices, parts, part_lse,
        *spans,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride()[:3],
        Tq, Tk, S, block, scale_log2,
        CAUSAL=causal, PACKED=packed, SPLITS=splits, BLOCK_S=triton.next_power_of_2(S),
        **row_constants("selected_blocks_fwd_rows", q, v, Hk, block), **dependent(q.device),
    )  # fmt: skip
    if splits > 1:
        launch_merge(parts, part_lse, out, lse)
    return out, lse


def row_constants(kernel: str, q: Tensor, v: Tensor, Hk: int, block: int) -> dict[str, int]:
    """Return the constants of a kernel of which a program takes the heads of one key head."""
    H, D, DV = q.shape[-2], q.shape[-1], v.shape[-1]
    config = dict(tiles(kernel, head_size(max(D, DV), q.dtype), q.device))
    # a tile is no longer than a block, but for the smallest one that a product takes
    least = smallest_dot(q.device)
    config["BLOCK_N"] = max(min(config["BLOCK_N"], triton.next_power_of_2(block)), least)
    rows = max(triton.next_power_of_2(H // Hk), least)
    return {"GROUP": H // Hk, "D": D, "DV": DV, "ROWS": rows, **config}
