"""Triton attention of one token to compressed blocks, and the choice of the blocks that it reads.

A program reads one part of the compressed keys of one key head for all heads of its group, keeps
the sums of weights by selection block, and what they are relative to; the merge of
``flash_attention`` puts the parts together (Flash-Decoding). With the lse of all keys a program for
each key head then puts the sums in proportion, adds them up over the heads, and takes the largest.

Lengths are read from memory and grids depend on shapes alone, so that launches recorded once serve
every step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, store_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.decode import launch_merge, num_splits
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks
from bitnet_triton.kernels.native_sparse.forward import (
    add_tile,
    rank_blocks,
    seen_blocks,
    take_best,
)
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tokens_of(leftpad_ptr, used_ptr, batch, tokens) -> tl.tensor:
    """Return how many tokens a row has, padding left out."""
    if used_ptr is not None:
        tokens = tl.load(used_ptr + batch)
    if leftpad_ptr is not None:
        tokens -= tl.load(leftpad_ptr + batch)
    return tokens


@triton.jit
def _compressed_attention_decode_kernel(
    # tensors: q [B 1 H D]; k [B N Hk D]; v [B N Hk DV]; out [B 1 H S DV] and lse [B 1 H S], of S
    # parts; lse in base 2, or as promised to callers where S is 1
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # float32 [B Hk 2 ROWS room], and what they are relative to [B Hk room / BLOCK_J ROWS]
    sums_ptr, pivots_ptr,
    # int32 [B] or None: the first token that is no padding, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    # sizes and scalars
    tokens, room, scale_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECTION: tl.constexpr, SELECT: tl.constexpr,
    LINES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to a part of the compressed keys with the heads of a group."""
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    BLOCK_J: tl.constexpr = BLOCK_N // LINES
    RATIO: tl.constexpr = SELECTION // STRIDE
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    key_head = tl.program_id(1)
    Hk = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    tokens = _tokens_of(leftpad_ptr, used_ptr, batch, tokens)
    program = batch * Hk + key_head
    sums_ptr += program * 2 * ROWS * room
    pivots_ptr += program * ROWS * (room // BLOCK_J)

    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = key_head * GROUP + rows
    q = load_rows(q_ptr + batch * q_stride_b, heads, q_stride_h, is_row, D, BLOCK_D)  # [ROWS, D]
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    seen = seen_blocks(tokens - 1, BLOCK, STRIDE)
    tiles = tl.cdiv(seen, BLOCK_J * RATIO)
    # tiles are not divided; those that every row sees whole need no mask
    of_split = tl.cdiv(tiles, splits)
    begin = split * of_split
    end = tl.minimum(begin + of_split, tiles)
    whole = tl.minimum(seen // BLOCK_N, end) if LINES == RATIO else 0
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums_at = sums_ptr + rows[:, None] * room
    for t in range(begin, whole):
        acc, top, total = add_tile(
            acc, top, total, q, k_ptr, v_ptr, k_stride_n, v_stride_n, None, seen, t,
            sums_at, ROWS * room, pivots_ptr + rows, scale_log2,
            D, DV, BLOCK // STRIDE, RATIO, True, SELECT, LINES, BLOCK_N,
        )  # fmt: skip
    for t in range(tl.maximum(begin, whole), end):
        acc, top, total = add_tile(
            acc, top, total, q, k_ptr, v_ptr, k_stride_n, v_stride_n, rows * 0 + seen, seen, t,
            sums_at, ROWS * room, pivots_ptr + rows, scale_log2,
            D, DV, BLOCK // STRIDE, RATIO, True, SELECT, LINES, BLOCK_N,
        )  # fmt: skip
    row = (batch * Hk * GROUP + heads) * splits + split
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ptr, row, DV, out, is_row, DV, BLOCK_DV)
    lse = top * scale_log2 + tl.log2(total)
    tl.store(lse_ptr + row, tl.where(splits == 1, lse * _LN_2, lse), mask=is_row)


@triton.jit
def _compressed_attention_take_kernel(
    # tensors: sums float32 [B Hk 2 ROWS room]; pivots [B Hk room / BLOCK_J ROWS]; lse [B H 1];
    # indices int32 [B 1 Hk SELECTED]; int64: ranks [B Hk room]
    sums_ptr, pivots_ptr, lse_ptr, indices_ptr, ranks_ptr,
    # int32 [B] or None: the first token that is no padding, one past the last one
    leftpad_ptr, used_ptr,
    # sizes
    tokens, room, initial, local,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    SELECTION: tl.constexpr, SELECTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Take the blocks that the heads of a group read, by the sums of BLOCK_C blocks at a time."""
    wait_for_inputs(DEPENDENT)
    TILES: tl.constexpr = BLOCK_C // BLOCK_J
    key_head = tl.program_id(0)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + key_head
    tokens = _tokens_of(leftpad_ptr, used_ptr, tl.program_id(1), tokens)
    sums_ptr += program * 2 * ROWS * room
    pivots_ptr += program * ROWS * (room // BLOCK_J)
    ranks_ptr += program * room
    # tiles of sums that there are
    tiles = tl.cdiv(seen_blocks(tokens - 1, BLOCK, STRIDE), BLOCK_J * (SELECTION // STRIDE))
    own = tl.where(tokens > 0, (tokens - 1) // SELECTION, -1)

    one = tl.arange(0, 1)
    cols = tl.arange(0, BLOCK_J)
    for start in range(0, own + 1, BLOCK_C):
        t = start // BLOCK_J + tl.arange(0, TILES)
        j = t[:, None] * BLOCK_J + cols[None, :]
        total = tl.zeros((TILES, BLOCK_J), tl.float32)
        for g in range(GROUP):
            lse = tl.load(lse_ptr + program * GROUP + g) / _LN_2
            # where nothing is seen, every weight is 0
            lse = tl.where(lse > float("-inf"), lse, float("inf"))
            at = pivots_ptr + t * ROWS + g
            share = tl.exp2(tl.load(at, mask=t < tiles, other=float("-inf")) - lse)
            at_sums = sums_ptr + g * room + j
            sums = tl.load(at_sums, mask=(t < tiles)[:, None], other=0.0)  # [TILES, BLOCK_J]
            total += sums * share[:, None]
            # what a block has beyond its selection block counts for the next one
            has = (t > 0) & (t <= tiles)
            before = tl.exp2(tl.load(at - ROWS, mask=has, other=float("-inf")) - lse)
            has = (j > 0) & (j <= tiles * BLOCK_J)
            over = tl.load(at_sums + ROWS * room - 1, mask=has, other=0.0)
            total += over * tl.where((cols == 0)[None, :], before[:, None], share[:, None])
        j = start + tl.arange(0, BLOCK_C)
        rank = rank_blocks(tl.reshape(total, (1, BLOCK_C)), j, one + own, initial, local)
        tl.store(ranks_ptr + j[None, :], rank)
    tl.debug_barrier()  # one thread reads what another one has stored
    take_best(
        ranks_ptr, room, indices_ptr + program * SELECTED, one, one == 0, own + 1, SELECTED,
        BLOCK_C,
    )  # fmt: skip


def launch_compressed_decode(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: SparseBlocks, scale: float, tokens: int,
    selects: bool = True, leftpad: Tensor | None = None, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with one query a row, without checks and only by launches: it can be captured.

    Args:
        q: [B 1 H D].
        k: [B N Hk D], a view of any strides whose last dimension is contiguous.
        v: [B N Hk Dv].
        blocks: sizes and numbers.
        scale: multiplies the scores, positive.
        tokens: that there may be at most, and that there are without ``used``.
        selects: whether blocks are chosen.
        leftpad: int32 [B], the first token that is no padding.
        used: int32 [B], one past the last token, the one of the query.

    Returns:
        out [B 1 H Dv] in the dtype of ``q`` and indices int32 [B 1 Hk selected], of no size where
        none are chosen.
    """
    (B, _, H, D), Hk, DV, device = q.shape, k.shape[2], v.shape[-1], q.device
    config = tiles("compressed_attention_decode", head_size(max(D, DV), q.dtype), device)
    lines = triton.next_power_of_2(blocks.ratio)
    width = config["BLOCK_N"] // lines  # selection blocks of a tile
    rows = max(triton.next_power_of_2(H // Hk), smallest_dot(device))
    count = blocks.compressed(tokens)
    # a part has a tile at least
    splits = max(min(num_splits(count, device), cdiv(count, width * blocks.ratio)), 1)
    taking = dict(tiles("compressed_attention_take", width, device))
    taking["BLOCK_C"] = max(taking["BLOCK_C"], width)  # whole tiles
    room = cdiv(cdiv(tokens, blocks.selection) + 1, taking["BLOCK_C"]) * taking["BLOCK_C"]
    floats: Any = {"dtype": torch.float32, "device": device}
    out = torch.empty((B, 1, H, DV), dtype=q.dtype, device=device)
    lse = torch.empty((B, H, 1), **floats)
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = (torch.empty((B, 1, H, splits, *d), **floats) for d in ((DV,), ()))
    sums = torch.empty((B, Hk, 2, rows, room) if selects else (0,), **floats)
    pivots = torch.empty((B, Hk, room // width, rows) if selects else (0,), **floats)
    sizes = {"GROUP": H // Hk, "BLOCK": blocks.block, "STRIDE": blocks.stride,
             "SELECTION": blocks.selection, "ROWS": rows, **dependent(device)}  # fmt: skip
    launch(_compressed_attention_decode_kernel, (splits, Hk, B))(
        q, k, v, parts, part_lse, sums, pivots, leftpad, used,
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        tokens, room, score_factors(scale, None)[0],
        D=D, DV=DV, SELECT=selects, LINES=lines, **sizes, **config,
    )  # fmt: skip
    if splits > 1:
        launch_merge(parts, part_lse, out, lse)
    indices = torch.empty(
        (B, 1, Hk, blocks.selected) if selects else (0,), dtype=torch.int32, device=device
    )
    if selects:
        ranks = torch.empty((B, Hk, room), dtype=torch.int64, device=device)
        launch(_compressed_attention_take_kernel, (Hk, B))(
            sums, pivots, lse, indices, ranks, leftpad, used,
            tokens, room, blocks.initial, blocks.local,
            SELECTED=blocks.selected, BLOCK_J=width, **sizes, **taking,
        )  # fmt: skip
    return out, indices
