"""Triton choice of blocks. One program scores the units of one key head for a tile of queries.

Scores of a tile of units become scores of blocks at once, and of these the best are kept as ranks
(``common/best``) in registers: the matrix of scores is never written. Few queries and many units
are divided among programs, each with its share of the blocks, and a second kernel merges what they
kept; on a CPU ``decode`` takes most of these. Lengths are read from memory and the grid depends on
shapes alone, so that a launch recorded once serves every decode step.

Queries are rows of the products on a GPU. On a CPU units are: they are multiplied where they lie,
and the queries, which are the same in every trip, are packed once (``UNITS_FIRST``, beside tiles).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.best.forward import ranks
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.top_blocks.decode import decode_objection, launch_top_blocks_decode
from bitnet_triton.kernels.top_blocks.tiles import (
    load_heads,
    load_units,
    round_to_codes,
    sequence_range,
)
from bitnet_triton.kernels.top_blocks.units import Units
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# Up to so many rows of queries, units are divided among programs
_FEW_ROWS = 16
# Bytes of units that a program reads at full length, and the most programs for one key head
_BYTES_OF_SPLIT, _BYTES_OF_SPLIT_ON_GPU = 1 << 18, 1 << 15
_MOST_SPLITS = 64

_NONE = tl.constexpr(-(2**63))
_FORCED = tl.constexpr(0x7FFFFFFF)
_NO_BLOCK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _empty(
    ROWS: tl.constexpr, BEST: tl.constexpr, SELECTED: tl.constexpr, AXIS: tl.constexpr
) -> tl.tensor:
    """Return BEST places along AXIS for ranks of rows: below every rank, no two alike.

    Places that are not used are on top.
    """
    slot = tl.arange(0, BEST)
    lowest = tl.where(slot < SELECTED, slot.to(tl.int64) + (_NONE + 1), 2**63 - 1)
    rows = tl.zeros((ROWS,), tl.int64)
    return tl.expand_dims(rows, AXIS) + tl.expand_dims(lowest, 1 - AXIS)


@triton.jit
def _keep(best, rank, AXIS: tl.constexpr) -> tl.tensor:
    """Put ranks [M] in the place of the lowest along AXIS of best, where they are higher."""
    worst = tl.min(best, axis=AXIS)
    is_taken = (best == tl.expand_dims(worst, AXIS)) & tl.expand_dims(rank > worst, AXIS)
    return tl.where(is_taken, tl.expand_dims(rank, AXIS), best)


@triton.jit
def _store_blocks(
    best, out_ptrs, is_row, BEST: tl.constexpr, SELECTED: tl.constexpr, AXIS: tl.constexpr
) -> None:
    """Store the blocks of ranks, BEST along AXIS, in order, -1 behind them, at ``out_ptrs`` [M]."""
    slot = tl.arange(0, BEST)
    is_block = (best > _NONE + BEST) & tl.expand_dims(slot < SELECTED, 1 - AXIS)
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    index = tl.where(is_block, index, _NO_BLOCK)
    last = tl.min(index, axis=AXIS) * 0 - 1
    for i in range(SELECTED):
        is_later = index > tl.expand_dims(last, AXIS)
        last = tl.min(tl.where(is_later, index, _NO_BLOCK), axis=AXIS)
        tl.store(out_ptrs + i, tl.where(last == _NO_BLOCK, -1, last), mask=is_row)


@triton.jit
def _products(q, k, acc, AXIS: tl.constexpr) -> tl.tensor:
    """Return the products of rows [M, D] and units [N, D], units along AXIS, added to ``acc``."""
    if AXIS == 0:
        return tl.dot(k, tl.trans(q), acc, input_precision="ieee")  # [N, M]
    else:
        return tl.dot(q, tl.trans(k), acc, input_precision="ieee")  # [M, N]


@triton.jit
def _block_values(
    q, q_least, q_ptr, at, q_stride_h, is_row, keys_ptr, keys_stride_u, scale_ptr, scale_stride_u,
    j0, whole, end_u, AXIS: tl.constexpr, MASKED: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, UNITS: tl.constexpr, BEFORE: tl.constexpr,
    RELOAD: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the best scores of rows in the blocks from j0 on, blocks along AXIS.

    Without a mask all units are seen. A block has UNITS that start in it; BEFORE more reach into
    it.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    COLUMNS: tl.constexpr = triton.next_power_of_2(UNITS + BEFORE)
    PLAIN: tl.constexpr = COLUMNS == UNITS
    NB: tl.constexpr = 1 if COLUMNS >= BLOCK_N else BLOCK_N // COLUMNS
    PARTS: tl.constexpr = COLUMNS // BLOCK_N if COLUMNS > BLOCK_N else 1
    M: tl.constexpr = q.shape[0]
    value = tl.full((NB, M) if AXIS == 0 else (M, NB), float("-inf"), tl.float32)
    for part in range(PARTS):
        c = part * BLOCK_N + tl.arange(0, BLOCK_N)
        if PLAIN:
            unit = j0 * UNITS + c
            is_unit = unit < end_u
        else:
            unit = (j0 + c // COLUMNS) * UNITS - BEFORE + c % COLUMNS
            is_unit = (c % COLUMNS < UNITS + BEFORE) & (unit >= 0) & (unit < end_u)
        start = j0 * UNITS + part * BLOCK_N
        is_loaded = is_unit if MASKED else None
        k = load_units(keys_ptr, unit, start, keys_stride_u, is_loaded, PLAIN, D, BLOCK_D)
        if RELOAD:  # both tiles of queries would not fit into registers
            q = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, 1, D, BLOCK_D)
        scores = _products(q, k, None, AXIS).to(tl.float32)
        if BOUNDS:
            if RELOAD:
                q_least = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, -1, D, BLOCK_D)
            k = load_units(keys_ptr + D, unit, start, keys_stride_u, is_loaded, PLAIN, D, BLOCK_D)
            scores = _products(q_least, k, scores, AXIS)
        if scale_ptr is not None:
            at_scale = scale_ptr + unit.to(tl.int64) * scale_stride_u
            scores *= tl.expand_dims(tl.load(at_scale, mask=is_unit, other=0.0), 1 - AXIS)
        if MASKED:
            is_whole = tl.expand_dims(unit, 1 - AXIS) < tl.expand_dims(whole, AXIS)
            is_seen = tl.expand_dims(is_unit, 1 - AXIS) & is_whole
            scores = tl.where(is_seen, scores, float("-inf"))
        if COLUMNS == 1:
            value = scores
        elif NB == 1:
            value = tl.maximum(value, tl.expand_dims(tl.max(scores, axis=AXIS), AXIS))
        elif AXIS == 0:
            value = tl.max(tl.reshape(scores, (NB, COLUMNS, M)), axis=1)
        else:
            value = tl.max(tl.reshape(scores, (M, NB, COLUMNS)), axis=2)
    return value


@triton.jit
def _keep_blocks(best, value, j0, own, initial, local, AXIS: tl.constexpr) -> tl.tensor:
    """Take the blocks from j0 on with their scores into the best ones, both along AXIS."""
    NB: tl.constexpr = value.shape[AXIS]
    j = tl.expand_dims(j0 + tl.arange(0, NB), 1 - AXIS)
    own = tl.expand_dims(own, AXIS)
    rank = ranks(value, j)
    rank = tl.where(value > float("-inf"), rank, _NONE)
    forced = (j < initial) | (j > own - local)
    highest = (tl.full(j.shape, _FORCED, tl.int64) << 32) | (0x7FFFFFFF - j).to(tl.int64)
    rank = tl.where(forced, highest, rank)
    rank = tl.where(j <= own, rank, _NONE)
    if NB == 1:
        best = _keep(best, tl.max(rank, axis=AXIS), AXIS)
    else:
        for i in range(NB):
            is_block = tl.expand_dims(tl.arange(0, NB) == i, 1 - AXIS)
            best = _keep(best, tl.max(tl.where(is_block, rank, _NONE), axis=AXIS), AXIS)
    return best


@triton.jit
def _top_blocks_fwd_kernel(
    # tensors: q [B Tq H D]; keys [B U Hu D], of bounds [B U Hu 2 D]; scale [B U Hu] or None;
    # out int32 [B Tq Hu SETS SELECTED], of several splits ranks int64 [B Tq Hu SETS SPLITS BEST]
    q_ptr, keys_ptr, scale_ptr, out_ptr,
    # int32 [B] or None: the first valid column, one past the last one; int32 [B + 1] or None
    leftpad_ptr, used_ptr, starts_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, keys_stride_b, keys_stride_u, keys_stride_h,
    scale_stride_b, scale_stride_u, scale_stride_h,
    # sizes
    Tq, Tk, initial, local,
    # compile-time; UNITS_FIRST: products are units times queries, not queries times units
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr,
    BOUNDS: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr,
    SELECTED: tl.constexpr, SPLITS: tl.constexpr, RELOAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS_FIRST: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BEST: tl.constexpr = triton.next_power_of_2(SELECTED)
    AXIS: tl.constexpr = 0 if UNITS_FIRST else 1
    BEFORE: tl.constexpr = WINDOW // STRIDE - 1
    COLUMNS: tl.constexpr = triton.next_power_of_2(UNITS + BEFORE)
    PLAIN: tl.constexpr = COLUMNS == UNITS
    NB: tl.constexpr = 1 if COLUMNS >= BLOCK_N else BLOCK_N // COLUMNS

    split = tl.program_id(0) % SPLITS
    key_head = tl.program_id(1)
    b = tl.program_id(2)
    Tq_all = Tq
    Tq, n, first, first_q = sequence_range(leftpad_ptr, used_ptr, starts_ptr, b, Tq, Tk)
    # the last rows see most: they start first
    tile = tl.cdiv(Tq * SETS, BLOCK_M) - 1 - tl.program_id(0) // SPLITS
    if tile < 0:
        return
    batch = b.to(tl.int64) if starts_ptr is None else b.to(tl.int64) * 0

    # row m: set m % SETS of those of the key head, of query m // SETS
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // SETS
    s = m % SETS
    is_row = t < Tq
    p = t + n - Tq
    own = tl.where(is_row & (p >= 0), p // (UNITS * STRIDE), -1)
    whole = tl.where(p + 1 >= WINDOW, (p + 1 - WINDOW) // STRIDE + 1, 0)
    blocks = tl.max(own, axis=0) + 1
    end_u = tl.max(tl.where(is_row, whole, 0), axis=0)

    row = first_q + t.to(tl.int64)
    at = row * q_stride_t + (key_head * SETS + s) * GROUP * q_stride_h
    q_ptr += batch * q_stride_b
    q_least = 0
    if BOUNDS:
        q = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, 1, D, BLOCK_D)
        q_least = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, -1, D, BLOCK_D)
        q_least = q_least.to(keys_ptr.dtype.element_ty)
    else:
        q = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, 0, D, BLOCK_D)
    q = round_to_codes(q) if scale_ptr is not None else q.to(keys_ptr.dtype.element_ty)

    first_u = (first // STRIDE).to(tl.int64)
    keys_ptr += batch * keys_stride_b + first_u * keys_stride_u + key_head * keys_stride_h
    if scale_ptr is not None:
        scale_ptr += batch * scale_stride_b + first_u * scale_stride_u + key_head * scale_stride_h

    best = _empty(BLOCK_M, BEST, SELECTED, AXIS)
    length = tl.cdiv(tl.cdiv(blocks, NB), SPLITS) * NB
    begin = split * length
    end = tl.minimum(begin + length, blocks)
    if UNITS_FIRST and PLAIN:
        # tiles of units that every row sees whole, before those at the edge
        seen = tl.min(tl.where(is_row, whole, whole + (1 << 30)), axis=0) // UNITS // NB * NB
        middle = tl.maximum(tl.minimum(seen, (end - begin) // NB * NB + begin), begin)
        for j0 in range(begin, middle, NB):
            value = _block_values(
                q, q_least, q_ptr, at, q_stride_h, is_row, keys_ptr, keys_stride_u, scale_ptr,
                scale_stride_u, j0, whole, end_u, AXIS, False, GROUP, D, BOUNDS, UNITS, BEFORE,
                RELOAD, BLOCK_N,
            )  # fmt: skip
            best = _keep_blocks(best, value, j0, own, initial, local, AXIS)
        begin = middle
    for j0 in range(begin, end, NB):
        value = _block_values(
            q, q_least, q_ptr, at, q_stride_h, is_row, keys_ptr, keys_stride_u, scale_ptr,
            scale_stride_u, j0, whole, end_u, AXIS, True, GROUP, D, BOUNDS, UNITS, BEFORE,
            RELOAD, BLOCK_N,
        )  # fmt: skip
        best = _keep_blocks(best, value, j0, own, initial, local, AXIS)

    Hu = tl.num_programs(1)
    set_row = ((batch * Tq_all + row) * Hu + key_head) * SETS + s
    if SPLITS == 1:
        _store_blocks(best, out_ptr + set_row * SELECTED, is_row, BEST, SELECTED, AXIS)
    else:
        slot = tl.expand_dims(tl.arange(0, BEST), 1 - AXIS)
        at_rank = tl.expand_dims((set_row * SPLITS + split) * BEST, AXIS) + slot
        # unused places count as empty from now on
        best = tl.where(slot < SELECTED, best, _NONE)
        tl.store(out_ptr + at_rank, best, mask=tl.expand_dims(is_row, AXIS) & (slot < BEST))


@triton.jit
def _top_blocks_merge_kernel(
    # tensors: ranks [M, C] int64; out [M, SELECTED] int32
    ranks_ptr, out_ptr,
    # sizes
    C,
    # compile-time
    DEPENDENT: tl.constexpr, SELECTED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BEST: tl.constexpr = triton.next_power_of_2(SELECTED)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BEST)
    rank = tl.load(ranks_ptr + row * C + cols, mask=cols < C, other=_NONE)  # [BLOCK_C]
    best = tl.full((BEST,), _NONE, tl.int64)
    last = tl.full((), 2**63 - 1, tl.int64)
    for i in range(SELECTED):
        # no two ranks are equal: the next one is the highest below the last
        last = tl.max(tl.where(rank < last, rank, _NONE), axis=0)
        best = tl.where(slot == i, last, best)
    out_ptrs = out_ptr + row * SELECTED + tl.zeros((1,), tl.int32)
    _store_blocks(best[None, :], out_ptrs, tl.full((1,), 1, tl.int1), BEST, SELECTED, 1)


def launch_top_blocks(
    q: Tensor,
    keys: Tensor,
    *,
    units: Units,
    block: int,
    selected: int,
    initial: int,
    local: int,
    sets: int,
    tokens: int,
    scale: Tensor | None = None,
    leftpad: Tensor | None = None,
    used: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Choose blocks, without checks and only by launches: it can be captured.

    Arguments are those of ``top_blocks``; ``starts`` is its ``cu_seqlens``, with q [1 T H D] then
    and keys [1 U Hu D].

    Returns:
        int32 [B Tq sets selected].
    """
    (B, Tq, H, D), Hu = q.shape, keys.shape[2]
    rows, sets_of_head = Tq * (sets // Hu), sets // Hu
    on_cpu = smallest_dot(q.device) == 1
    if on_cpu and starts is None and decode_objection(rows, units, block) is None:
        return launch_top_blocks_decode(
            q, keys, units=units, block=block, selected=selected, initial=initial, local=local,
            sets=sets, tokens=tokens, scale=scale, leftpad=leftpad, used=used,
        )  # fmt: skip
    config = tiles("top_blocks_fwd", head_size(D, q.dtype), q.device)
    splits = _num_splits(rows, units.rows(tokens), keys, block // units.stride, config["BLOCK_N"])
    block_m = config["BLOCK_M"]
    if rows <= _FEW_ROWS:
        block_m = max(triton.next_power_of_2(rows), smallest_dot(q.device))
    best = triton.next_power_of_2(selected)
    out = torch.empty((B, Tq, sets, selected), dtype=torch.int32, device=q.device)
    found = out
    if splits > 1:
        found = torch.empty((B, Tq, sets, splits * best), dtype=torch.int64, device=q.device)
    sequences = B if starts is None else starts.shape[0] - 1
    launch(_top_blocks_fwd_kernel, (cdiv(rows, block_m) * splits, Hu, sequences))(
        q, keys, scale, found, leftpad, used, starts,
        *q.stride()[:3], *keys.stride()[:3], *((0, 0, 0) if scale is None else scale.stride()),
        Tq, tokens, initial, local,
        GROUP=H // sets, SETS=sets_of_head, D=D, BOUNDS=units.kind == "bounds",
        STRIDE=units.stride, WINDOW=units.window, UNITS=block // units.stride,
        SELECTED=selected, SPLITS=splits,
        RELOAD=units.kind == "bounds" and q.dtype == torch.float32 and q.device.type != "cpu",
        **(config | {"BLOCK_M": block_m}), **dependent(q.device),
    )  # fmt: skip
    if splits > 1:
        launch(_top_blocks_merge_kernel, (B * Tq * sets,))(
            found, out, splits * best,
            SELECTED=selected, BLOCK_C=triton.next_power_of_2(splits * best),
            **tiles("top_blocks_merge", splits * best, q.device), **dependent(q.device),
        )  # fmt: skip
    return out


def _num_splits(rows: int, units: int, keys: Tensor, per_block: int, block_n: int) -> int:
    """Return among how many programs to divide the units; by shapes alone."""
    if rows > _FEW_ROWS:
        return 1
    on_cpu = smallest_dot(keys.device) == 1
    of_split = _BYTES_OF_SPLIT if on_cpu else _BYTES_OF_SPLIT_ON_GPU
    wanted = cdiv(units * keys.shape[-1] * keys.element_size(), of_split)
    return max(min(wanted, cdiv(units, max(per_block, block_n)), _MOST_SPLITS), 1)
