"""Triton choice of blocks for one token or a few, on a CPU: bound by reading the units once.

A program reads its share of the units of one key head in small tiles: while all queries meet one,
the next one arrives. It keeps nothing but a number for each block, which orders like its score. A
second kernel, one program for each row of them, halves the range that the score of the last chosen
block must lie in until as many as are wanted are not below.

Lengths are read from memory and the grid depends on shapes alone, so that launches recorded once
serve every decode step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.best.forward import ranks
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.top_blocks.tiles import (
    load_heads,
    load_units,
    round_to_codes,
    sequence_range,
)
from bitnet_triton.kernels.top_blocks.units import Units
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles

# Rows of queries of a key head, and how many of them one product of floats takes
MOST_ROWS = 8
_ROWS = 4
# Bytes of units that a program reads at full length
_BYTES_OF_SPLIT = 1 << 18

_NONE = tl.constexpr(-(2**31))
_FORCED = tl.constexpr(2**31 - 1)


@triton.jit
def _load_queries(
    q_ptr, row, stride_t, stride_h, key_head, Tq, coded, GROUP: tl.constexpr, SETS: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, KIND: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return the queries of rows in the type of the units, and of bounds what is negative."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    t = row // SETS
    at = t.to(tl.int64) * stride_t + (key_head * SETS + row % SETS) * GROUP * stride_h
    is_row = t < Tq
    if BOUNDS:
        q = load_heads(q_ptr, at, stride_h, is_row, GROUP, 1, D, BLOCK_D)
        least = load_heads(q_ptr, at, stride_h, is_row, GROUP, -1, D, BLOCK_D)
        return q.to(KIND), least.to(KIND)
    else:
        q = load_heads(q_ptr, at, stride_h, is_row, GROUP, 0, D, BLOCK_D)
        q = round_to_codes(q) if coded else q.to(KIND)
        return q, q


@triton.jit
def _fetch(ptr, unit, stride_u, WIDTH: tl.constexpr) -> None:
    """Ask for units of WIDTH values ahead of their use, as products of floats do by themselves.

    They may lie anywhere: nothing is read.
    """
    OF_LINE: tl.constexpr = 512 // ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(WIDTH, OF_LINE))
    line = tl.arange(0, LINES) * OF_LINE
    tl.load(ptr + unit.to(tl.int64)[:, None] * stride_u + line[None, :], volatile=True)


@triton.jit
def _keep_best(value, scores, is_unit, unit, whole, MASKED: tl.constexpr) -> tl.tensor:
    """Return the best scores so far [M, NB], those of a tile [M, N] included."""
    M: tl.constexpr = value.shape[0]
    NB: tl.constexpr = value.shape[1]
    if MASKED:
        is_seen = is_unit[None, :] & (unit[None, :] < whole[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
    if unit.shape[0] == NB:
        return tl.maximum(value, scores)
    elif NB == 1:
        return tl.maximum(value, tl.max(scores, axis=1)[:, None])
    else:
        return tl.maximum(value, tl.max(tl.reshape(scores, (M, NB, unit.shape[0] // NB)), axis=2))


@triton.jit
def _best_units(
    value, q, q_least, k, k_least, is_unit, unit, whole, MASKED: tl.constexpr,
    BOUNDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the best scores so far [M, NB], those of a tile of units [N, D] included."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if BOUNDS:
        scores = tl.dot(q_least, tl.trans(k_least), scores, input_precision="ieee")
    return _keep_best(value, scores, is_unit, unit, whole, MASKED)


@triton.jit
def _best_codes(value, q, k, scale, is_unit, unit, whole, MASKED: tl.constexpr) -> tl.tensor:
    """Do the same with codes, which are packed: products byte row by byte row are slower."""
    scores = tl.dot(q, tl.trans(k)).to(tl.float32) * scale[None, :]  # [M, N]
    return _keep_best(value, scores, is_unit, unit, whole, MASKED)


@triton.jit
def store_keys(
    keys_ptr, value, row, j, end, own, initial, local, N, Hu, key_head, Tq, SETS: tl.constexpr
) -> None:
    """Store numbers that order like scores [M, NB]: what is always chosen above, no block below."""
    j, own = j[None, :], own[:, None]
    key = tl.where(value > float("-inf"), (ranks(value, j) >> 32).to(tl.int32), _NONE)
    key = tl.where((j < initial) | (j > own - local), _FORCED, key)
    key = tl.where(j <= own, key, _NONE)
    t = row // SETS
    at = (t * Hu + key_head) * SETS + row % SETS
    tl.store(keys_ptr + at[:, None] * N + j, key, mask=(t < Tq)[:, None] & (j < end))


@triton.jit
def _top_blocks_score_kernel(
    # tensors: q [B Tq H D]; units [B U Hu D], of bounds [B U Hu 2 D]; scale [B U Hu] or None; keys
    # int32 [B Tq Hu SETS N]
    q_ptr, units_ptr, scale_ptr, keys_ptr,
    # int32 [B] or None: the first valid column, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, units_stride_b, units_stride_u, units_stride_h,
    scale_stride_b, scale_stride_u, scale_stride_h,
    # sizes
    Tq, Tk, N, initial, local,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr,
    BOUNDS: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr,
    ROWS: tl.constexpr, MORE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write what blocks are compared by. Rows are ROWS, and MORE behind them."""
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    KIND: tl.constexpr = units_ptr.dtype.element_ty
    NB: tl.constexpr = 1 if UNITS >= BLOCK_N else BLOCK_N // UNITS
    PARTS: tl.constexpr = UNITS // BLOCK_N if UNITS > BLOCK_N else 1
    key_head = tl.program_id(1)
    Hu = tl.num_programs(1)
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    _, n, first, _ = sequence_range(leftpad_ptr, used_ptr, None, b, Tq, Tk)

    m = tl.arange(0, ROWS)
    more = ROWS + tl.arange(0, MORE if MORE > 0 else 1)
    q_ptr += batch * q_stride_b
    q0, least0 = _load_queries(
        q_ptr, m, q_stride_t, q_stride_h, key_head, Tq, scale_ptr is not None, GROUP, SETS, D,
        BOUNDS, KIND,
    )  # fmt: skip
    q1, least1 = q0, least0
    if MORE > 0:
        q1, least1 = _load_queries(
            q_ptr, more, q_stride_t, q_stride_h, key_head, Tq, scale_ptr is not None, GROUP,
            SETS, D, BOUNDS, KIND,
        )  # fmt: skip
    # the first query sees least, the last one most
    p0 = m // SETS + n - Tq
    p1 = more // SETS + n - Tq
    own0 = tl.where(p0 >= 0, p0 // (UNITS * STRIDE), -1)
    own1 = tl.where(p1 >= 0, p1 // (UNITS * STRIDE), -1)
    whole0 = tl.where(p0 + 1 >= WINDOW, (p0 + 1 - WINDOW) // STRIDE + 1, 0)
    whole1 = tl.where(p1 + 1 >= WINDOW, (p1 + 1 - WINDOW) // STRIDE + 1, 0)
    end_u = tl.where(n >= WINDOW, (n - WINDOW) // STRIDE + 1, 0)
    seen = tl.where(n - Tq + 1 >= WINDOW, (n - Tq + 1 - WINDOW) // STRIDE + 1, 0) // UNITS

    first_u = (first // STRIDE).to(tl.int64)
    units_ptr += batch * units_stride_b + first_u * units_stride_u + key_head * units_stride_h
    if scale_ptr is not None:
        scale_ptr += batch * scale_stride_b + first_u * scale_stride_u + key_head * scale_stride_h
    keys_ptr += batch * Tq * Hu * SETS * N

    blocks = tl.cdiv(n, UNITS * STRIDE)
    length = tl.cdiv(tl.cdiv(blocks, NB), tl.num_programs(0)) * NB
    begin = tl.program_id(0) * length
    end = tl.minimum(begin + length, blocks)
    # tiles of units that every row sees whole, before those at the edge
    middle = tl.maximum(tl.minimum(seen // NB * NB, (end - begin) // NB * NB + begin), begin)
    lanes = tl.arange(0, BLOCK_N)
    for is_edge in tl.static_range(2):
        from_j = middle if is_edge else begin
        to_j = end if is_edge else middle
        for j0 in range(from_j, to_j, NB):
            value0 = tl.full((ROWS, NB), float("-inf"), tl.float32)
            value1 = tl.full((more.shape[0], NB), float("-inf"), tl.float32)
            for part in range(PARTS):
                start = j0 * UNITS + part * BLOCK_N
                unit = start + lanes
                is_unit = unit < end_u
                is_loaded = is_unit if is_edge else None
                k = load_units(units_ptr, unit, start, units_stride_u, is_loaded, True, D, BLOCK_D)
                k_least = k
                if BOUNDS:
                    k_least = load_units(
                        units_ptr + D, unit, start, units_stride_u, is_loaded, True, D, BLOCK_D
                    )
                if scale_ptr is not None:
                    _fetch(units_ptr, start + BLOCK_N + lanes, units_stride_u, D)
                    at_scale = scale_ptr + unit.to(tl.int64) * scale_stride_u
                    scale = tl.load(at_scale, mask=is_loaded, other=0.0 if is_edge else None)
                    value0 = _best_codes(value0, q0, k, scale, is_unit, unit, whole0, is_edge)
                else:
                    value0 = _best_units(
                        value0, q0, least0, k, k_least, is_unit, unit, whole0, is_edge, BOUNDS
                    )
                if MORE > 0:
                    value1 = _best_units(
                        value1, q1, least1, k, k_least, is_unit, unit, whole1, is_edge, BOUNDS
                    )
            j = j0 + tl.arange(0, NB)
            store_keys(keys_ptr, value0, m, j, end, own0, initial, local, N, Hu, key_head, Tq, SETS)
            if MORE > 0:
                store_keys(
                    keys_ptr, value1, more, j, end, own1, initial, local, N, Hu, key_head, Tq,
                    SETS,
                )  # fmt: skip


@triton.jit
def _count(keys_ptr, blocks, least, BLOCK_J: tl.constexpr) -> tl.tensor:
    """Return how many of ``blocks`` numbers are not below ``least``."""
    lanes = tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_J,), tl.int32)
    for j0 in range(0, blocks, BLOCK_J):
        key = tl.load(keys_ptr + j0 + lanes, mask=j0 + lanes < blocks, other=_NONE)
        total += (key >= least).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _top_blocks_take_kernel(
    # tensors: keys int32 [B queries R N], of R sets; out int32 [B Tq R SELECTED]
    keys_ptr, out_ptr,
    # int32 [B] or None: the first valid column, one past the last one
    leftpad_ptr, used_ptr,
    # sizes; the launch takes the queries from t0 on
    Tq, Tk, t0, N, R, block,
    # compile-time
    DEPENDENT: tl.constexpr, SELECTED: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Write the blocks with the highest keys of one row, in order, of equal ones the first."""
    wait_for_inputs(DEPENDENT)
    BEST: tl.constexpr = triton.next_power_of_2(SELECTED)
    b = tl.program_id(1)
    batch = b.to(tl.int64)
    _, n, _, _ = sequence_range(leftpad_ptr, used_ptr, None, b, Tq, Tk)
    p = t0 + tl.program_id(0) // R + n - Tq
    blocks = tl.where(p >= 0, p // block + 1, 0)
    keys_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * N
    out_ptr += ((batch * Tq + t0) * R + tl.program_id(0)) * SELECTED

    # as many as are wanted are not below `low`, or that is lowest; fewer are not below `high`
    low = tl.full((), _NONE, tl.int64)
    high = tl.full((), _FORCED + 1, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        found = _count(keys_ptr, blocks, middle.to(tl.int32), BLOCK_J)
        low = tl.where(found >= SELECTED, middle, low)
        high = tl.where(found > SELECTED, high, tl.where(found == SELECTED, low + 1, middle))
    last = low.to(tl.int32)
    above = 0
    if last < _FORCED:
        above = _count(keys_ptr, blocks, last + 1, BLOCK_J)

    lanes = tl.arange(0, BLOCK_J)
    equal, taken = above * 0, above * 0
    for j0 in range(0, blocks, BLOCK_J):
        key = tl.load(keys_ptr + j0 + lanes, mask=j0 + lanes < blocks, other=_NONE)
        is_last = ((key == last) & (key > _NONE)).to(tl.int32)
        is_taken = (key > last) | ((is_last > 0) & (equal + tl.cumsum(is_last) <= SELECTED - above))
        at = taken + tl.cumsum(is_taken.to(tl.int32)) - 1
        tl.store(out_ptr + at, j0 + lanes, mask=is_taken)
        equal += tl.sum(is_last, axis=0)
        taken += tl.sum(is_taken.to(tl.int32), axis=0)
    slot = tl.arange(0, BEST)
    tl.store(out_ptr + slot, -1, mask=(slot >= taken) & (slot < SELECTED))


def launch_top_blocks_decode(
    q: Tensor, keys: Tensor, *, units: Units, block: int, selected: int, initial: int, local: int,
    sets: int, tokens: int, scale: Tensor | None, leftpad: Tensor | None, used: Tensor | None,
) -> Tensor:  # fmt: skip
    """Choose blocks for up to MOST_ROWS rows of queries of each key head, by launches alone.

    Arguments are those of ``launch_top_blocks``, with units of which a power of two makes a block.
    """
    (B, Tq, H, D), Hu = q.shape, keys.shape[2]
    rows, N = Tq * (sets // Hu), cdiv(tokens, block)
    # codes are packed for all rows at once
    together = min(triton.next_power_of_2(rows), _ROWS) if scale is None else MOST_ROWS
    found = torch.empty((B, Tq, sets, N), dtype=torch.int32, device=q.device)
    out = torch.empty((B, Tq, sets, selected), dtype=torch.int32, device=q.device)
    config = tiles("top_blocks_score", D, q.device)
    bytes_of_head = units.rows(tokens) * keys.shape[-1] * keys.element_size()
    splits = max(min(cdiv(bytes_of_head, _BYTES_OF_SPLIT), N), 1)
    launch(_top_blocks_score_kernel, (splits, Hu, B))(
        q, keys, scale, found, leftpad, used,
        *q.stride()[:3], *keys.stride()[:3], *((0, 0, 0) if scale is None else scale.stride()),
        Tq, tokens, N, initial, local,
        GROUP=H // sets, SETS=sets // Hu, D=D, BOUNDS=units.kind == "bounds",
        STRIDE=units.stride, WINDOW=units.window, UNITS=block // units.stride,
        ROWS=together, MORE=triton.next_power_of_2(rows - together) if rows > together else 0,
        **config, **dependent(q.device),
    )  # fmt: skip
    launch_take(found, out, leftpad, used, tokens=tokens, block=block)
    return out


def launch_take(
    keys: Tensor, out: Tensor, leftpad: Tensor | None, used: Tensor | None, *, tokens: int,
    block: int, first: int = 0,
) -> None:  # fmt: skip
    """Write to ``out`` [B Tq R S] the blocks with the highest ``keys`` [B T R N].

    They are those of T queries, from number ``first`` on.
    """
    (B, T, R, N), (Tq, selected) = keys.shape, (out.shape[1], out.shape[3])
    launch(_top_blocks_take_kernel, (T * R, B))(
        keys, out, leftpad, used, Tq, tokens, first, N, R, block, SELECTED=selected,
        **tiles("top_blocks_take", N, keys.device), **dependent(keys.device),
    )  # fmt: skip


def decode_objection(rows: int, units: Units, block: int) -> str | None:
    """Say why these kernels do not choose for so many rows of a key head; None where they do."""
    per_block = block // units.stride
    if rows > MOST_ROWS:
        return f"{rows} rows of queries; up to {MOST_ROWS} run"
    if units.before or per_block & (per_block - 1):
        return "units reach into several blocks, or no power of two of them makes a block"
    return None
