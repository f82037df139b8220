"""Triton selection of the keys that a row attends to: the largest scores, or large weights.

One program finds, for a tile of rows of one head, the least of the pairs that each row takes, in
the order of ``order_keys``. No score is stored: each pass over the keys computes them again and
counts how many stand above some bounds between two others, until a bound has exactly ``top_k``
above it. The kernels of attention then leave out every pair below.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    find_tile,
    head_band,
    key_positions,
    listed_keys,
    load_rows,
    open_rows,
    score_tile,
    seen_keys,
    visible_tile,
)
from bitnet_triton.kernels.exact_attention.arguments import ExactCall
from bitnet_triton.kernels.exact_attention.order import order_keys
from bitnet_triton.kernels.flash_attention.bands import Band, dense_band, heads_table
from bitnet_triton.kernels.flash_attention.operands import (
    common,
    grid_tiles,
    key_flags,
    row_flags,
    strides,
    tokens_of,
)
from bitnet_triton.kernels.flash_attention.prepare import Prepared
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import head_size, tiles

# the order of a pair that a row does not see, and one behind every other
_LEAST = tl.constexpr(-(2**63))
_MOST = tl.constexpr(2**63 - 1)
# bounds counted in a pass: 2**_BITS
_BITS = tl.constexpr(2)


@triton.jit
def _score_of(order) -> tl.tensor:
    """Return the score of a pair by its order."""
    rank = (order >> 32).to(tl.int32)
    return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(tl.float32, bitcast=True)


@triton.jit
def _middle(above, below) -> tl.tensor:
    """Return an order between that of the last pair to take and that of the next one.

    Half way between their scores, where they differ: kernels that add up a score in another order
    take the same pairs then.
    """
    rank, next_rank = above >> 32, below >> 32
    half = next_rank + (rank - next_rank + 1) // 2
    return tl.where(rank == next_rank, above, half << 32)


@triton.jit
def _order_tile(
    # rows: queries, their positions and the bounds of what they see; c and step of their class
    q, p, low, high, c, step, dilation,
    # keys: the number of the first one, how many have a number, tiles of them, then the list
    k_ptr, k_stride_t, key_flags_ptr, t, low0, n, own, keys_ptr, listed,
    block, summary, scale_log2, softcap_log2,
    # compile-time
    KIND: tl.constexpr, DILATED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the order of the pairs [M, N] of a tile of keys, the least one where unseen."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    s = low0 + t * BLOCK_N + tl.arange(0, BLOCK_N)
    j = key_positions(s, c, step, block, summary, KIND, DILATED)
    is_key = (s < n) & (t < own)
    visible = visible_tile(s, low, high, p, j, dilation, key_flags_ptr, is_key, KIND, DILATED)
    visible = visible & is_key[None, :]
    if keys_ptr is not None:
        at = (t - own) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_listed = (at >= 0) & (at < listed)
        token = tl.load(keys_ptr + at, mask=is_listed, other=0)
        j = tl.where(is_listed, token, j)
        is_key = is_key | is_listed
        by_all = is_listed[None, :]
        if CAUSAL:
            by_all = by_all & (j[None, :] <= p[:, None])
        visible = visible | by_all
    k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    scores, _ = score_tile(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_N]
    return tl.where(visible, order_keys(scores, j[None, :]), _LEAST)


@triton.jit
def _narrowed(counts, bottom, top, count, bound, top_k) -> tuple:
    """Return new bounds, given how many pairs stand at ``bottom`` + w ``bound`` or above."""
    WAYS: tl.constexpr = 1 << _BITS
    ways = tl.arange(0, WAYS)
    w = tl.sum((counts >= top_k).to(tl.int32), 1) - 1
    is_open = count > top_k
    higher = bottom + w * bound
    lower_top = tl.where(w < WAYS - 1, tl.minimum(higher + bound, top), top)
    above = tl.sum(tl.where(ways[None, :] == w[:, None], counts, 0), 1)
    return (
        tl.where(is_open, higher, bottom),
        tl.where(is_open, lower_top, top),
        tl.where(is_open, above, count),
    )


@triton.jit
def _exact_attention_select_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; cuts int64 [B H Tq]
    q_ptr, k_ptr, cuts_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # int32 list of the keys that everybody sees (``list_range``), flags of all keys; or None
    keys_ptr, key_flags_ptr,
    # rows that see everything: their list in their own launch, else their flags
    rows_ptr, row_flags_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    # sizes and scalars; None for what the mask has not
    B, Tq, Tk, block, summary, sinks, scale_log2, softcap_log2, top_k, threshold_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
    DILATED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    WAYS: tl.constexpr = 1 << _BITS
    head = tl.program_id(1)
    H = tl.num_programs(1)
    step, left, right, dilation = head_band(heads_ptr, head)
    b, tile, tiles = find_tile(lengths_ptr, rows_ptr, B, Tq, step, 1, BLOCK_M)
    if tile >= tiles:
        return
    rows, p, R, is_row, first, last, c, start_k, n_k, batch, flat = open_rows(
        lengths_ptr, rows_ptr, row_flags_ptr, b, tiles - 1 - tile, B, Tq, Tk, step, DILATED, BLOCK_M
    )
    if key_flags_ptr is not None:
        key_flags_ptr += flat * Tk + start_k
    k_ptr += batch * k_stride_b + start_k.to(tl.int64) * k_stride_t + head // GROUP * k_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    n, low, high, low0, edges, whole, more = seen_keys(
        R, is_row, first, last, c, step, left, right, n_k, block, summary, sinks,
        KIND, DILATED, BLOCK_N,
    )  # fmt: skip
    own = edges + whole + more  # tiles, before those of the list
    listed = 0
    if keys_ptr is not None:
        start, listed = listed_keys(keys_ptr, b, B, p, is_row, CAUSAL, BLOCK_N)
        keys_ptr += start
    all_tiles = own + tl.cdiv(listed, BLOCK_N)

    # ``count`` pairs stand at ``bottom`` or above it, fewer than top_k at ``top``
    bottom = tl.full((BLOCK_M,), _MOST, tl.int64)
    top = tl.full((BLOCK_M,), _LEAST, tl.int64)
    count = tl.zeros((BLOCK_M,), tl.int32)
    for t in range(all_tiles):
        order = _order_tile(
            q, p, low, high, c, step, dilation, k_ptr, k_stride_t, key_flags_ptr, t, low0, n, own,
            keys_ptr, listed, block, summary, scale_log2, softcap_log2, KIND, DILATED, CAUSAL, D,
            BLOCK_N,
        )  # fmt: skip
        visible = order > _LEAST
        bottom = tl.minimum(bottom, tl.min(tl.where(visible, order, _MOST), 1))
        top = tl.maximum(top, tl.max(order, 1))
        count += tl.sum(visible.to(tl.int32), 1)

    cut = bottom
    if threshold_log2 is not None:
        # position 0x7FFFFFFF: every key with that score
        cut = order_keys(_score_of(top) + threshold_log2, 0x7FFFFFFF)
    if top_k is not None:
        top += 1
        while tl.max(count, 0) > top_k:
            # halves differ by less than 2**63, whatever the bounds are
            bound = tl.maximum((top >> _BITS) - (bottom >> _BITS), 1)
            counts = tl.zeros((BLOCK_M, WAYS), tl.int32)
            for t in range(all_tiles):
                order = _order_tile(
                    q, p, low, high, c, step, dilation, k_ptr, k_stride_t, key_flags_ptr, t, low0,
                    n, own, keys_ptr, listed, block, summary, scale_log2, softcap_log2, KIND,
                    DILATED, CAUSAL, D, BLOCK_N,
                )  # fmt: skip
                for w in tl.static_range(WAYS):
                    above = tl.sum((order >= (bottom + w * bound)[:, None]).to(tl.int32), 1)
                    counts += tl.where((tl.arange(0, WAYS) == w)[None, :], above[:, None], 0)
            bottom, top, count = _narrowed(counts, bottom, top, count, bound, top_k)
        cut = tl.maximum(cut, bottom) if threshold_log2 is not None else bottom

    above = tl.full((BLOCK_M,), _MOST, tl.int64)
    below = tl.full((BLOCK_M,), _LEAST, tl.int64)
    for t in range(all_tiles):
        order = _order_tile(
            q, p, low, high, c, step, dilation, k_ptr, k_stride_t, key_flags_ptr, t, low0, n, own,
            keys_ptr, listed, block, summary, scale_log2, softcap_log2, KIND, DILATED, CAUSAL, D,
            BLOCK_N,
        )  # fmt: skip
        is_taken = order >= cut[:, None]
        above = tl.minimum(above, tl.min(tl.where(is_taken, order, _MOST), 1))
        below = tl.maximum(below, tl.max(tl.where(is_taken, _LEAST, order), 1))
    cut = tl.where(below > _LEAST, _middle(above, below), _LEAST)
    tl.store(cuts_ptr + (flat * H + head) * Tq + rows, cut, mask=is_row)


def launch_select(q: Tensor, k: Tensor, exact: ExactCall, prepared: Prepared) -> Tensor:
    """Return int64 [B H Tq] ([H, sum Tq]): the order from which on each row takes its pairs.

    The mask has one band.
    """
    *lead, T, H, _ = q.shape
    cuts = torch.empty((*lead, H, T), dtype=torch.int64, device=q.device)
    _launch_band(q, k, exact, prepared, prepared.bands[0], cuts, dense=False)
    if prepared.rows is not None:
        _launch_band(q, k, exact, prepared, dense_band(exact.call.mask.causal), cuts, dense=True)
    return cuts


def _launch_band(
    q: Tensor,
    k: Tensor,
    exact: ExactCall,
    prepared: Prepared,
    band: Band,
    cuts: Tensor,
    *,
    dense: bool,
) -> None:
    call, H = exact.call, q.shape[-2]
    sinks, threshold = call.mask.sinks, exact.threshold
    config = tiles("exact_attention_select", head_size(q.shape[-1], q.dtype), q.device)
    batch = prepared.lengths.shape[0] if prepared.lengths is not None else q.shape[0]
    grid = (grid_tiles(q, config["BLOCK_M"], band, batch), H, 1 if prepared.packed else batch)
    launch(_exact_attention_select_kernel, grid)(
        q, k, cuts,
        heads_table(band, H, q.device), prepared.lengths,
        tokens_of(None if dense else prepared.keys), None if dense else key_flags(prepared),
        tokens_of(prepared.rows if dense else None), row_flags(prepared, dense),
        *strides(q), *strides(k),
        sinks=sinks if sinks and not dense else None,
        top_k=exact.top_k,
        threshold_log2=None if threshold is None else math.log2(threshold),
        **common(q, k, k, call, prepared, band),
        **config,
    )  # fmt: skip
