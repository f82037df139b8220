"""Triton forward of attention_mass: one program a tile of keys of one query head.

It goes over the queries that see its keys, as the gradient of the values does, and sums their
weights on the way; no two programs add to one number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    CLASS,
    find_tile,
    head_band,
    load_rows,
    load_run,
    score_tile,
)
from bitnet_triton.kernels.common.attention_backward import (
    edge_rows,
    listed_rows,
    open_keys,
    rows_of_class,
    seeing_rows,
)
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.bands import heads_table
from bitnet_triton.kernels.flash_attention.launch import KeyPass, key_passes, row_tiles
from bitnet_triton.kernels.flash_attention.operands import (
    common,
    grid_tiles,
    key_flags,
    row_flags,
    strides,
    tokens_of,
)
from bitnet_triton.kernels.flash_attention.prepare import Prepared, prepare_call
from bitnet_triton.runtime import launch

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_pivot(lse_ptr, row_flags_ptr, first, rows, is_row) -> tl.tensor:
    """Load lse in base 2; +inf, which makes every weight 0, for rows that give nothing here."""
    at = first.to(tl.int64) + rows
    if is_row is None:
        lse = tl.load(lse_ptr + at)
    else:
        lse = tl.load(lse_ptr + at, mask=is_row, other=float("-inf"))
    gives = lse > float("-inf")
    if row_flags_ptr is not None:
        if is_row is None:
            gives = gives & (tl.load(row_flags_ptr + at) == 0)
        else:
            gives = gives & (tl.load(row_flags_ptr + at, mask=is_row, other=1) == 0)
    return tl.where(gives, lse * _LOG2_E, float("inf"))


@triton.jit
def _attention_mass_fwd_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; lse [B H Tq]; mass [B H Tk]
    q_ptr, k_ptr, lse_ptr, mass_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # keys that everybody sees: their list in their own launch, else their flags
    keys_ptr, key_flags_ptr,
    # rows that see everything: the same
    rows_ptr, row_flags_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    # sizes and scalars; None for what the band has not
    B, Tq, Tk, block, summary, sinks, scale_log2, softcap_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, DILATED: tl.constexpr,
    CAUSAL: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    CLASSES: tl.constexpr = DILATED and KIND == CLASS
    head = tl.program_id(1)
    H = tl.num_programs(1)
    step, left, right, dilation = head_band(heads_ptr, head)
    b, tile, tiles = find_tile(lengths_ptr, keys_ptr, B, Tk, step, 3, BLOCK_N)
    if tile >= tiles:
        return
    j, s, is_key, first, last, j0, j1, c, start_k, start_q, n_q, offset, batch, flat = open_keys(
        lengths_ptr, keys_ptr, b, tile, B, Tq, Tk, step, block, summary, KIND, DILATED, BLOCK_N
    )
    if KIND != CLASS:  # noqa: SIM102 - the compiler knows
        if last < first:
            return
    keys = start_k + j
    k_ptr += batch * k_stride_b + head // GROUP * k_stride_h
    k = load_rows(k_ptr, keys, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    # keys that everybody sees get all they receive elsewhere
    is_here = is_key
    if sinks is not None:
        is_here = is_here & (j >= sinks)
    if key_flags_ptr is not None:
        is_here = is_here & (tl.load(key_flags_ptr + flat * Tk + keys, mask=is_key, other=1) == 0)
    any_here = tl.max(is_here.to(tl.int32), 0) > 0
    i0, R0, n_rows = rows_of_class(c, offset, n_q, step, CLASSES)
    q_ptr += batch * q_stride_b + start_q.to(tl.int64) * q_stride_t + head * q_stride_h
    lse_ptr += (flat * H + head) * Tq + start_q
    if row_flags_ptr is not None:
        row_flags_ptr += flat * Tq + start_q

    low, high, low0, edges, whole, more = seeing_rows(
        s, j, first, last, j0, j1, any_here, c, step, left, right, block, R0, n_rows,
        KIND, keys_ptr is not None, CAUSAL, BLOCK_M,
    )  # fmt: skip
    start = 0
    skipped = 0
    listed = 0
    if rows_ptr is not None:
        start, listed, skipped, edges = listed_rows(rows_ptr, b, B, low0, offset, any_here, BLOCK_M)
        whole, more = 0, 0
    elif KIND != CLASS and DILATED:
        edges, whole, more = edges + whole + more, 0, 0

    mass = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(edges, edges + whole):
        first_i = low0 - R0 + t * BLOCK_M
        i = tl.arange(0, BLOCK_M)
        if CLASSES:
            first_i = i0 + step * first_i
            i = (step * i).to(tl.int64)  # any number of rows apart
        q = load_run(q_ptr, first_i, i, q_stride_t, None, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        pivot = _load_pivot(lse_ptr, row_flags_ptr, first_i, i, None)
        scores, _ = score_tile(k, q, scale_log2, softcap_log2)  # [BLOCK_N, BLOCK_M]
        mass += tl.sum(tl.exp2(scores - pivot[None, :]), axis=1)
    for t in range(edges + more):
        first_R = low0 + tl.where(t < edges, t, t + whole) * BLOCK_M
        first_i, i, R, is_row = edge_rows(
            rows_ptr, start, listed, skipped, t, first_R, R0, n_rows, offset, i0, step,
            CLASSES, BLOCK_M,
        )  # fmt: skip
        q = load_run(q_ptr, first_i, i, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        pivot = _load_pivot(lse_ptr, row_flags_ptr, first_i, i, is_row)
        visible = (R[None, :] >= low[:, None]) & (R[None, :] < high[:, None])
        if KIND != CLASS and DILATED:
            visible = visible & ((R[None, :] - j[:, None]) % dilation == 0)
        scores, _ = score_tile(k, q, scale_log2, softcap_log2)  # [BLOCK_N, BLOCK_M]
        # the lse of a row bounds the scores that it sees; those of others could overflow
        weights = tl.exp2(tl.where(visible, scores - pivot[None, :], float("-inf")))
        mass += tl.sum(weights, axis=1)

    mass = tl.where(is_here, mass, 0.0)
    at_key = mass_ptr + (flat * H + head) * Tk + keys
    if ACCUMULATE:
        mass += tl.load(at_key, mask=is_key, other=0.0)
    tl.store(at_key, mass, mask=is_key)


def launch_mass(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    """Map q, k and lse to what each key receives from each query head, [B H Tk] in float32."""
    prepared = prepare_call(q, k, call)
    *lead, Tk, _, _ = k.shape
    make = torch.zeros if prepared.zeroed else torch.empty
    mass = make((*lead, q.shape[-2], Tk), dtype=torch.float32, device=q.device)
    for number, one in enumerate(key_passes(call, prepared)):
        _start(q, k, lse, mass, call, prepared, one, accumulate=number > 0)
    return mass


def _start(
    q: Tensor, k: Tensor, lse: Tensor, mass: Tensor, call: Call, prepared: Prepared, one: KeyPass,
    *, accumulate: bool,
) -> None:  # fmt: skip
    band, keys, rows = one
    config = row_tiles("attention_mass_fwd", k, k)
    H = q.shape[-2]
    batch = prepared.lengths.shape[0] if prepared.lengths is not None else q.shape[0]
    whole = keys is None and rows is None
    settings = common(q, k, k, call, prepared, band)
    del settings["DV"]
    grid = (grid_tiles(k, config["BLOCK_N"], band, batch), H, 1 if prepared.packed else batch)
    launch(_attention_mass_fwd_kernel, grid)(
        q, k, lse, mass,
        heads_table(band, H, q.device), prepared.lengths,
        tokens_of(keys), key_flags(prepared) if whole else None,
        tokens_of(rows), row_flags(prepared, rows is not None),
        *strides(q), *strides(k),
        sinks=call.mask.sinks if call.mask.sinks and whole else None,
        ACCUMULATE=accumulate, **settings, **config,
    )  # fmt: skip
