"""Triton attention over keys and values in pages, read where they lie (arXiv:2309.06180).

A program takes a tile of queries of one sequence, with all query heads that share a key head, so
that a page is read once for the group. Sequences of few queries divide their keys among programs
(split-KV), which a second kernel merges; sequences of more have one program a tile. A packed call
starts both, and each takes the sequences that are its own: nobody asks the device for lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    accumulate,
    find_tile,
    load_rows,
    load_run,
    raw_scores,
    softmax_step,
    store_rows,
)
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.bands import OPEN
from bitnet_triton.kernels.flash_attention.decode import MOST_QUERIES, num_splits
from bitnet_triton.kernels.flash_attention.operands import score_factors, strides
from bitnet_triton.kernels.flash_attention.paged_call import PagedCall, page_tile
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# How many bytes of a head's keys and values ahead pages are fetched on a CPU
_BYTES_AHEAD = 8192

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sequence(starts_ptr, b, Tq) -> tuple:
    """Return the first row of a sequence's queries, and how many there are."""
    if starts_ptr is None:
        return b.to(tl.int64) * Tq, Tq
    else:
        first = tl.load(starts_ptr + b)
        return first.to(tl.int64), tl.load(starts_ptr + b + 1) - first


@triton.jit
def _fetch(ptr, rows, stride, D: tl.constexpr) -> None:
    """Ask for rows of a page, a cache line at a time: on a CPU, a load that is not used fetches."""
    OF_LINE: tl.constexpr = 512 // ptr.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(D, OF_LINE))) * OF_LINE
    at = ptr + rows.to(tl.int64)[:, None] * stride + tl.minimum(line, D - 1)[None, :]
    tl.load(at, volatile=True)


@triton.jit
def _flash_attention_paged_kernel(
    # tensors: q [B Tq H D] or [R H D]; k [P page Hk D]; v [P page Hk DV]; out [R H DV], and
    # lse as promised to callers; with S splits out [B FEW H S DV] and lse [B FEW H S] in base 2
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # int32: table [B N]; used [B], keys of a sequence; starts [B + 1] of packed queries, or None
    table_ptr, used_ptr, starts_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_p, k_stride_t, k_stride_h,
    v_stride_p, v_stride_t, v_stride_h, table_stride, lse_stride_b, lse_stride_h,
    # sizes and scalars; B is None where nothing is packed, sinks without
    B, Tq, left, right, sinks, scale_log2, softcap_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, FEW: tl.constexpr,
    MANY: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    if MANY:
        b, tile, tiles = find_tile(None, starts_ptr, B, Tq, 1, 1, QUERIES)
        split = 0
        # the last queries see most: they start first
        first_t = (tiles - 1 - tile) * QUERIES
    else:
        b = tl.program_id(2)
        split = tl.program_id(0)
        first_t = 0
    first_row, n_q = _sequence(starts_ptr, b, Tq)
    if starts_ptr is not None:
        # the other launch of a packed call has the other sequences
        if MANY:
            if (first_t < 0) | (n_q <= FEW):
                return
        elif n_q > FEW:
            return
    n = tl.load(used_ptr + b)

    # row m of the tile: query m // GROUP of head m % GROUP of the group
    m = tl.arange(0, ROWS)
    t = first_t + m // GROUP
    head = key_head * GROUP + m % GROUP
    is_row = (m < QUERIES * GROUP) & (t < n_q)
    p = t + n - n_q
    low = tl.maximum(p - left, 0)
    high = tl.minimum(p + right + 1, n)
    sink_end = 0 * p
    if sinks is not None:
        sink_end = tl.minimum(tl.minimum(p + 1, n) if CAUSAL else n, sinks) + sink_end
    start = tl.min(tl.where(is_row, low, n), 0)
    end = tl.max(tl.where(is_row, tl.maximum(high, sink_end), 0), 0)

    # a split of start .. end in whole tiles, and the sinks ahead for the first one
    start = start // BLOCK_N * BLOCK_N
    length = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), SPLITS), BLOCK_N) * BLOCK_N
    begin = start + split * length
    end = tl.minimum(begin + length, end)
    ahead = tl.where(split == 0, tl.minimum(tl.max(sink_end, 0), start), 0)
    tiles_ahead = tl.cdiv(ahead, BLOCK_N)

    batch = b.to(tl.int64)
    q_rows = t.to(tl.int64)
    if starts_ptr is not None:
        q_rows += first_row
    row_at = q_rows * q_stride_t + head * q_stride_h
    q = load_rows(q_ptr + batch * q_stride_b, row_at, 1, is_row, D, BLOCK_D)  # [ROWS, BLOCK_D]
    table_ptr += batch * table_stride
    k_ptr += key_head * k_stride_h
    v_ptr += key_head * v_stride_h
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for i in range(tiles_ahead + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)):
        is_ahead = i < tiles_ahead
        at = tl.where(is_ahead, i * BLOCK_N, begin + (i - tiles_ahead) * BLOCK_N)
        j = at + lanes
        is_key = j < tl.where(is_ahead, ahead, end)
        # int64: page * stride overflows int32 early. [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
        if BLOCK_N > PAGE:
            page = tl.load(table_ptr + j // PAGE, mask=is_key, other=0).to(tl.int64)
            slot = (j % PAGE).to(tl.int64)
            k = load_rows(k_ptr, page * k_stride_p + slot * k_stride_t, 1, is_key, D, BLOCK_D)
            v = load_rows(v_ptr, page * v_stride_p + slot * v_stride_t, 1, is_key, DV, BLOCK_DV)
        else:
            page = tl.load(table_ptr + at // PAGE).to(tl.int64)
            slot = at % PAGE
            if AHEAD:
                later = tl.maximum(tl.minimum(at + AHEAD, end - 1), 0)
                page_ahead = tl.load(table_ptr + later // PAGE).to(tl.int64)
                rows = later % PAGE // BLOCK_N * BLOCK_N + lanes
                _fetch(k_ptr + page_ahead * k_stride_p, rows, k_stride_t, D)
                _fetch(v_ptr + page_ahead * v_stride_p, rows, v_stride_t, DV)
            k = load_run(k_ptr + page * k_stride_p, slot, lanes, k_stride_t, is_key, D, BLOCK_D)
            v = load_run(v_ptr + page * v_stride_p, slot, lanes, v_stride_t, is_key, DV, BLOCK_DV)
        scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [ROWS, BLOCK_N]
        visible = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if sinks is not None:
            visible = visible | (j[None, :] < sink_end[:, None])
        scores = tl.where(visible & is_key[None, :], scores, float("-inf"))
        if ROWS <= 4:
            # on a CPU: values are widened as they are read, nothing is packed, weights keep float32
            weights, shrink, top, total = softmax_step(top, total, scores, factor)
            products = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
            acc = acc * shrink[:, None] + products  # [ROWS, BLOCK_DV]
        else:
            acc, top, total = accumulate(acc, top, total, scores, factor, v)

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    lse = top * factor + tl.log2(total)
    if SPLITS == 1:
        store_rows(out_ptr, (first_row + t) * H + head, DV, out, is_row, DV, BLOCK_DV)
        at_lse = lse_ptr + batch * lse_stride_b + head * lse_stride_h + q_rows
        tl.store(at_lse, lse * _LN_2, mask=is_row)
    else:
        part = ((batch * FEW + t) * H + head) * SPLITS + split
        store_rows(out_ptr, part, DV, out, is_row, DV, BLOCK_DV)
        tl.store(lse_ptr + part, lse, mask=is_row)


@triton.jit
def _flash_attention_paged_merge_kernel(
    # tensors: parts [B FEW H S DV] and part_lse [B FEW H S], base 2, float32; out [R H DV]; lse;
    # int32 starts [B + 1] of packed queries, or None
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, starts_ptr,
    # strides, in elements
    lse_stride_b, lse_stride_h,
    # sizes
    Tq, H,
    # compile-time
    DEPENDENT: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_S: tl.constexpr = triton.next_power_of_2(SPLITS)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    t = tl.program_id(0) // H
    head = tl.program_id(0) % H
    b = tl.program_id(1)
    first_row, n_q = _sequence(starts_ptr, b, Tq)
    if (t >= n_q) | (n_q > FEW):
        return
    batch = b.to(tl.int64)
    part = ((batch * FEW + t) * H + head) * SPLITS
    s = tl.arange(0, BLOCK_S)
    lses = tl.load(part_lse_ptr + part + s, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(lses, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lses - pivot)
    total = tl.sum(weights, 0)
    # parts of splits without a key are zeros
    parts = load_rows(parts_ptr, part + s, DV, s < SPLITS, DV, BLOCK_DV)  # [BLOCK_S, BLOCK_DV]
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    dims = tl.arange(0, BLOCK_DV)
    row = first_row + t
    at = out_ptr + (row * H + head) * DV + dims
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=dims < DV)
    at_lse = lse_ptr + batch * lse_stride_b + head * lse_stride_h + t
    if starts_ptr is not None:
        at_lse += first_row
    tl.store(at_lse, (top + tl.log2(total)) * _LN_2)


def launch_paged(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> tuple[Tensor, Tensor]:
    """Attend by launches alone, without checks: it can be captured.

    Args:
        q: [B Tq H D], or [R H D] packed.
        k: [P page Hk D], of any strides whose last dimension is contiguous.
        v: [P page Hk Dv], likewise.
        call: everything else.

    Returns:
        out in the dtype of ``q`` and lse in float32; zeros and -inf behind the last packed query.
    """
    *lead, Tq, H, _ = q.shape
    out_shape, lse_shape = (*lead, Tq, H, v.shape[-1]), (*lead, H, Tq)
    if not lead:
        # rows behind the last sequence are nobody's
        out = q.new_zeros(out_shape)
        lse = q.new_full(lse_shape, float("-inf"), dtype=torch.float32)
        _launch_few(q, k, v, out, lse, call, few=1)
        if q.shape[0] > 1:
            _launch_many(q, k, v, out, lse, call, few=1)
        return out, lse
    out, lse = q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)
    start = _launch_few if Tq <= MOST_QUERIES else _launch_many
    start(q, k, v, out, lse, call, few=Tq)
    return out, lse


def _launch_few(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: PagedCall, *, few: int
) -> None:
    """Start the programs of sequences with at most ``few`` queries."""
    (B, N), PAGE = call.block_table.shape, k.shape[1]
    H, Hk, DV = q.shape[-2], k.shape[2], v.shape[-1]
    keys = N * PAGE
    if call.mask.window is not None and call.mask.causal:
        keys = min(keys, call.mask.window)
    splits = num_splits(keys, q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = out.new_empty((B, few, H, splits, DV), dtype=lse.dtype)
        part_lse = lse.new_empty((B, few, H, splits))
    size = head_size(max(q.shape[-1], DV), q.dtype)
    config = dict(tiles("flash_attention_paged", size, q.device))
    rows = max(config.pop("ROWS"), triton.next_power_of_2(few * (H // Hk)))
    config["BLOCK_N"] = min(config["BLOCK_N"], page_tile(PAGE))
    launch(_flash_attention_paged_kernel, (splits, Hk, B))(
        q, k, v, parts, part_lse, *_operands(q, k, v, lse, call),
        **_constants(q, k, v, call), SPLITS=splits, FEW=few, MANY=False, QUERIES=few, ROWS=rows,
        AHEAD=_tokens_ahead(k, v, config["BLOCK_N"]), **config, **dependent(q.device),
    )  # fmt: skip
    if splits > 1:
        Tq = q.shape[-3]
        launch(_flash_attention_paged_merge_kernel, (few * H, B))(
            parts, part_lse, out, lse, call.cu_seqlens_q, *_lse_strides(lse), Tq, H,
            DV=DV, SPLITS=splits, FEW=few,
            **tiles("flash_attention_paged_merge", DV, q.device), **dependent(q.device),
        )  # fmt: skip


def _tokens_ahead(k: Tensor, v: Tensor, tile: int) -> int:
    """Return how many tokens ahead a page is fetched, in whole tiles; 0: a GPU needs none."""
    if smallest_dot(k.device) > 1:
        return 0
    tokens = _BYTES_AHEAD // (k.element_size() * (k.shape[-1] + v.shape[-1]))
    return max(tokens // tile, 1) * tile


def _launch_many(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: PagedCall, *, few: int
) -> None:
    """Start the programs of sequences with more than ``few`` packed queries, or of all rows."""
    B, PAGE = call.block_table.shape[0], k.shape[1]
    Tq, H, Hk, DV = q.shape[-3], q.shape[-2], k.shape[2], v.shape[-1]
    size = head_size(max(q.shape[-1], DV), q.dtype)
    config = dict(tiles("flash_attention_paged_many", size, q.device))
    # a tile lies in one page or, on a CPU, in several: its addresses would take twice the registers
    if config["BLOCK_N"] <= PAGE or smallest_dot(q.device) > 1:
        config["BLOCK_N"] = min(config["BLOCK_N"], page_tile(PAGE))
    rows = max(config.pop("ROWS"), triton.next_power_of_2(H // Hk))
    queries = rows // (H // Hk)
    packed = call.cu_seqlens_q is not None
    grid = (cdiv(Tq, queries) + (B if packed else 0), Hk, 1 if packed else B)
    launch(_flash_attention_paged_kernel, grid)(
        q, k, v, out, lse, *_operands(q, k, v, lse, call),
        **_constants(q, k, v, call), SPLITS=1, FEW=few, MANY=True, QUERIES=queries, ROWS=rows,
        AHEAD=0, **config, **dependent(q.device),
    )  # fmt: skip


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    return (0, lse.stride(0)) if lse.ndim == 2 else (lse.stride(0), lse.stride(1))


def _operands(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, call: PagedCall) -> tuple:
    """Return what the kernel takes behind its own tensors, in order."""
    mask = call.mask
    return (
        call.block_table, call.seqused_k, call.cu_seqlens_q,
        *strides(q), *k.stride()[:3], *v.stride()[:3], call.block_table.stride(0),
        *_lse_strides(lse),
        call.block_table.shape[0] if call.cu_seqlens_q is not None else None, q.shape[-3],
        OPEN if mask.window is None else mask.window - 1,
        0 if mask.causal else OPEN if mask.window_right is None else mask.window_right,
        mask.sinks or None, *score_factors(call.scale, call.softcap),
    )  # fmt: skip


def _constants(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> dict:
    return {
        "GROUP": q.shape[-2] // k.shape[2], "D": q.shape[-1], "DV": v.shape[-1],
        "CAUSAL": call.mask.causal, "PAGE": k.shape[1],
    }  # fmt: skip
