"""Triton backward of attention (arXiv:2307.08691, algorithm 2), deterministic: no atomics.

Three kernels. delta: what the others need of a row beside its vectors, once. dq: one program a tile
of queries, as in the forward. dkdv: one program a tile of keys of one key head, over the queries
that see it and over the query heads that share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.flash_attention.tiles import (
    CLASS,
    column_bounds,
    count_keys,
    count_up_to,
    find_rows,
    find_tile,
    floor_div,
    is_taken,
    key_positions,
    list_range,
    load_keys,
    load_rows,
    load_run,
    row_bounds,
    row_class,
    score_tile,
    sequence_lengths,
    split_tiles,
    store_rows,
    visible_tile,
)

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _flash_attention_bwd_delta_kernel(
    # tensors: out, dout [rows H DV]; lse, dlse, pivot, delta [B H Tq]; dlse may be None
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, pivot_ptr, delta_ptr,
    # sizes: rows of a sequence, heads
    T, H,
    # compile-time
    DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store what the gradients of the scores of a row share, and lse as a pivot of the weights.

    The pivot is lse in base 2, but +inf, which makes every weight 0, for rows that see nothing.
    """
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = (batch * T + t) * H + head
    out = load_rows(out_ptr, rows, DV, t < T, DV, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    dout = load_rows(dout_ptr, rows, DV, t < T, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout, axis=1)
    at = (batch * H + head) * T + t
    lse = tl.load(lse_ptr + at, mask=t < T, other=0.0)
    is_empty = lse == float("-inf")
    if dlse_ptr is not None:
        # a row that sees nothing has no gradient, whatever comes in
        dlse = tl.load(dlse_ptr + at, mask=t < T, other=0.0)
        delta -= tl.where(is_empty, 0.0, dlse)
    tl.store(pivot_ptr + at, tl.where(is_empty, float("inf"), lse * _LOG2_E), mask=t < T)
    tl.store(delta_ptr + at, delta, mask=t < T)


@triton.jit
def _score_scale(scale_log2, softcap_log2) -> tl.tensor:
    """Return what the scores were multiplied with before the cap."""
    if softcap_log2 is None:
        return scale_log2 * _LN_2
    else:
        return scale_log2 * softcap_log2 * _LN_2


@triton.jit
def _add_dq(
    acc, q, dout, pivot, delta, cut, j, k, v, visible, scale_log2, softcap_log2
) -> tl.tensor:
    """Add what one tile of keys gives to dq, without the scale; visible is None for all pairs."""
    scores, slope = score_tile(q, k, scale_log2, softcap_log2)  # [BLOCK_M, BLOCK_N]
    if cut is not None:
        visible = visible & is_taken(scores, j[None, :], cut[:, None])
    weights = tl.exp2(scores - pivot[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    dscores = weights * (dweights - delta[:, None]) * slope
    return tl.dot(dscores.to(k.dtype), k, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_D]


@triton.jit
def _flash_attention_bwd_dq_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # cuts as in the forward, or None; dq [B Tq H D]
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, cuts_ptr, dq_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # keys that everybody sees: the list, where sequences start in it, flags of all keys; or None
    keys_ptr, keys_start_ptr, key_flags_ptr,
    # rows that see everything: their list and its starts in their own launch, else their flags
    rows_ptr, rows_start_ptr, row_flags_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars; None for what the band has not
    B, Tq, Tk, block, summary, sinks, scale_log2, softcap_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
    DILATED: tl.constexpr, CAUSAL: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    BLOCK_E: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N
    head = tl.program_id(1)
    H = tl.num_programs(1)
    step = tl.load(heads_ptr + 4 * head)
    left = tl.load(heads_ptr + 4 * head + 1)
    right = tl.load(heads_ptr + 4 * head + 2)
    dilation = tl.load(heads_ptr + 4 * head + 3)
    b, tile, tiles = find_tile(lengths_ptr, rows_start_ptr, B, Tq, step, 1, BLOCK_M)
    if tile >= tiles:
        return
    tile = tiles - 1 - tile

    start_q, n_q, start_k, n_k = sequence_lengths(lengths_ptr, b, Tq, Tk)
    i, R, c, is_row, first, last = find_rows(
        rows_ptr, rows_start_ptr, b, tile, n_q, n_k - n_q, step, DILATED, BLOCK_M
    )
    p = i + (n_k - n_q)
    batch = b.to(tl.int64)
    flat = batch * 0 if B is not None else batch
    rows = start_q + i
    if row_flags_ptr is not None:
        flags = tl.load(row_flags_ptr + flat * Tq + rows, mask=is_row, other=1)
        is_row = is_row & (flags == 0)
    if key_flags_ptr is not None:
        key_flags_ptr += flat * Tk + start_k
    k_ptr += batch * k_stride_b + start_k.to(tl.int64) * k_stride_t + head // GROUP * k_stride_h
    v_ptr += batch * v_stride_b + start_k.to(tl.int64) * v_stride_t + head // GROUP * v_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    at_row = (flat * Tq + rows) * H + head
    q = load_rows(q_ptr, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, at_row, DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    at_pivot = (flat * H + head) * Tq + rows
    pivot = tl.load(pivot_ptr + at_pivot, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + at_pivot, mask=is_row, other=0.0)
    cut = None
    if cuts_ptr is not None:
        cut = tl.load(cuts_ptr + at_pivot, mask=is_row, other=0)

    n = count_keys(n_k, c, step, block, summary, KIND, DILATED)
    low, high = row_bounds(R, c, step, left, right, n, block, summary, sinks, KIND)
    low0, high0 = row_bounds(first, c, step, left, right, n, block, summary, sinks, KIND)
    low1, high1 = row_bounds(last, c, step, left, right, n, block, summary, sinks, KIND)
    high1 = tl.where(tl.max(is_row.to(tl.int32), 0) > 0, high1, low0)
    edges, whole, more = split_tiles(low0, low1, high0, high1, BLOCK_N)
    if (key_flags_ptr is not None) or (cuts_ptr is not None) or (KIND != CLASS and DILATED):
        edges, whole, more = edges + whole + more, 0, 0

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for t in range(edges, edges + whole):
        first_s = low0 + t * BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        j = key_positions(first_s + lanes, c, step, block, summary, KIND, DILATED)
        k = load_keys(k_ptr, first_s, lanes, j, k_stride_t, None, D, BLOCK_D, KIND, DILATED)
        v = load_keys(v_ptr, first_s, lanes, j, v_stride_t, None, DV, BLOCK_DV, KIND, DILATED)
        acc = _add_dq(acc, q, dout, pivot, delta, None, j, k, v, None, scale_log2, softcap_log2)

    for t in range(edges + more):
        first_s = low0 + tl.where(t < edges, t, t + whole) * BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        s = first_s + lanes
        j = key_positions(s, c, step, block, summary, KIND, DILATED)
        k = load_keys(k_ptr, first_s, lanes, j, k_stride_t, s < n, D, BLOCK_D, KIND, DILATED)
        v = load_keys(v_ptr, first_s, lanes, j, v_stride_t, s < n, DV, BLOCK_DV, KIND, DILATED)
        visible = visible_tile(s, low, high, p, j, dilation, key_flags_ptr, s < n, KIND, DILATED)
        acc = _add_dq(acc, q, dout, pivot, delta, cut, j, k, v, visible, scale_log2, softcap_log2)

    if keys_ptr is not None:
        start, listed = list_range(keys_start_ptr, b)
        if CAUSAL:
            last_p = tl.max(tl.where(is_row, p, -1), 0)
            listed = count_up_to(keys_ptr, start, listed, last_p, BLOCK_E)
        for t in range(0, listed, BLOCK_E):
            at = t + tl.arange(0, BLOCK_E)
            j = tl.load(keys_ptr + start + at, mask=at < listed, other=0)
            k = load_rows(k_ptr, j, k_stride_t, at < listed, D, BLOCK_D)  # [BLOCK_E, BLOCK_D]
            v = load_rows(v_ptr, j, v_stride_t, at < listed, DV, BLOCK_DV)  # [BLOCK_E, BLOCK_DV]
            visible = (at < listed)[None, :]
            if CAUSAL:
                visible = visible & (j[None, :] <= p[:, None])
            acc = _add_dq(
                acc, q, dout, pivot, delta, cut, j, k, v, visible, scale_log2, softcap_log2
            )

    acc *= _score_scale(scale_log2, softcap_log2)
    if ACCUMULATE:
        acc += load_rows(dq_ptr, at_row, D, is_row, D, BLOCK_D)
    store_rows(dq_ptr, at_row, D, acc, is_row, D, BLOCK_D)


@triton.jit
def _add_dkdv(
    dk, dv, q, dout, pivot, delta, cut, j, k, v, visible, scale_log2, softcap_log2
) -> tuple:
    """Add what one tile of rows gives to dk (without the scale) and dv."""
    scores, slope = score_tile(k, q, scale_log2, softcap_log2)  # [BLOCK_N, BLOCK_M]
    if cut is not None:
        visible = visible & is_taken(scores, j[:, None], cut[None, :])
    weights = tl.exp2(scores - pivot[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_DV]
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    dscores = weights * (dweights - delta[None, :]) * slope
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def _load_row_tile(
    q_ptr, dout_ptr, pivot_ptr, delta_ptr, row_flags_ptr, first, rows, is_row, q_stride_t, H,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
) -> tuple:  # fmt: skip
    """Load q, dout, pivot and delta of the rows first + rows.

    All pointers stand at row 0 of the head; is_row is None if all rows exist.
    """
    start = first.to(tl.int64)
    q = load_run(q_ptr, first, rows, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_run(dout_ptr, first, rows, H * DV, is_row, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    pivot = _load_row_values(pivot_ptr + start, rows, is_row, float("inf"))
    delta = _load_row_values(delta_ptr + start, rows, is_row, 0.0)
    if row_flags_ptr is not None:
        flags = _load_row_values(row_flags_ptr + start, rows, is_row, 1)
        pivot = tl.where(flags == 0, pivot, float("inf"))
    return q, dout, pivot, delta


@triton.jit
def _load_row_values(ptr, rows, is_row, other) -> tl.tensor:
    if is_row is None:
        return tl.load(ptr + rows)
    else:
        return tl.load(ptr + rows, mask=is_row, other=other)


@triton.jit
def _flash_attention_bwd_dkdv_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; dout [B Tq H DV]; pivot, delta [B H Tq];
    # cuts as in the forward, or None; dk, dv as k, v but contiguous
    q_ptr, k_ptr, v_ptr, dout_ptr, pivot_ptr, delta_ptr, cuts_ptr, dk_ptr, dv_ptr,
    # int32 [H 4]: step, left, right, dilation; int32 [B 4]: lengths of sequences, or None
    heads_ptr, lengths_ptr,
    # keys that everybody sees: their list and its starts in their own launch, else their flags
    keys_ptr, keys_start_ptr, key_flags_ptr,
    # rows that see everything: the same
    rows_ptr, rows_start_ptr, row_flags_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars; None for what the band has not
    B, Tq, Tk, block, summary, sinks, scale_log2, softcap_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr,
    DILATED: tl.constexpr, CAUSAL: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    LISTED: tl.constexpr = keys_ptr is not None
    # query heads of a group share their classes
    step = tl.load(heads_ptr + 4 * key_head * GROUP)
    b, tile, tiles = find_tile(lengths_ptr, keys_start_ptr, B, Tk, step, 3, BLOCK_N)
    if tile >= tiles:
        return

    start_q, n_q, start_k, n_k = sequence_lengths(lengths_ptr, b, Tq, Tk)
    offset = n_k - n_q
    if KIND == CLASS:
        # keys are numbered like rows that stand at offset 0
        j, s, c, is_key, first, last = find_rows(
            keys_ptr, keys_start_ptr, b, tile, n_k, 0, step, DILATED, BLOCK_N
        )
        j0 = c + step * first if DILATED else first
        j1 = c + step * last if DILATED else last
    else:
        c = 0
        n = count_keys(n_k, c, step, block, summary, KIND, DILATED)
        s = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = s < n
        j = key_positions(s, c, step, block, summary, KIND, DILATED)
        first = tile * BLOCK_N
        last = tl.minimum(first + BLOCK_N, n) - 1
        j0 = key_positions(first, c, step, block, summary, KIND, DILATED)
        j1 = key_positions(last, c, step, block, summary, KIND, DILATED)
        if last < first:
            return
    batch = b.to(tl.int64)
    flat = batch * 0 if B is not None else batch
    keys = start_k + j
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    k = load_rows(k_ptr, keys, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, keys, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    # keys that everybody sees get all their gradient elsewhere
    is_here = is_key
    if sinks is not None:
        is_here = is_here & (j >= sinks)
    if key_flags_ptr is not None:
        is_here = is_here & (tl.load(key_flags_ptr + flat * Tk + keys, mask=is_key, other=1) == 0)
    any_here = tl.max(is_here.to(tl.int32), 0) > 0

    # the class of rows that sees this class of keys: i = i0 + step r, R = R0 + r
    i0 = 0
    R0 = offset
    n_rows = n_q
    CLASSES: tl.constexpr = DILATED and KIND == CLASS
    if CLASSES:
        i0 = c - offset
        i0 -= floor_div(i0, step) * step
        _, R0 = row_class(i0, offset, step, DILATED)
        n_rows = tl.maximum(tl.cdiv(n_q - i0, step), 0)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for g in range(GROUP):
        head = key_head * GROUP + g
        left = tl.load(heads_ptr + 4 * head + 1)
        right = tl.load(heads_ptr + 4 * head + 2)
        dilation = tl.load(heads_ptr + 4 * head + 3)
        low, high = column_bounds(s, j, c, step, left, right, block, KIND, LISTED, CAUSAL)
        low0, high0 = column_bounds(first, j0, c, step, left, right, block, KIND, LISTED, CAUSAL)
        low1, high1 = column_bounds(last, j1, c, step, left, right, block, KIND, LISTED, CAUSAL)
        low0, low1 = tl.maximum(low0, R0), tl.maximum(low1, R0)
        high0, high1 = tl.minimum(high0, R0 + n_rows), tl.minimum(high1, R0 + n_rows)
        high1 = tl.where(any_here, high1, low0)
        edges, whole, more = split_tiles(low0, low1, high0, high1, BLOCK_M)
        start = 0
        skipped = 0
        listed = 0
        if rows_ptr is not None:
            start, listed = list_range(rows_start_ptr, b)
            skipped = count_up_to(rows_ptr, start, listed, low0 - offset - 1, BLOCK_M)
            edges = tl.where(any_here, tl.cdiv(listed - skipped, BLOCK_M), 0)
            whole, more = 0, 0
        elif (cuts_ptr is not None) or (KIND != CLASS and DILATED):
            edges, whole, more = edges + whole + more, 0, 0

        at_head = (flat * Tq + start_q) * H + head
        at_pivot = (flat * H + head) * Tq + start_q
        q_head = q_ptr + batch * q_stride_b + head * q_stride_h + start_q.to(tl.int64) * q_stride_t
        flags_head = row_flags_ptr
        if row_flags_ptr is not None:
            flags_head += flat * Tq + start_q
        for t in range(edges, edges + whole):
            first_i = low0 - R0 + t * BLOCK_M
            i = tl.arange(0, BLOCK_M)
            if CLASSES:
                first_i = i0 + step * first_i
                i = (step * i).to(tl.int64)  # any number of rows apart
            q, dout, pivot, delta = _load_row_tile(
                q_head, dout_ptr + at_head * DV, pivot_ptr + at_pivot, delta_ptr + at_pivot,
                flags_head, first_i, i, None, q_stride_t, H, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            dk, dv = _add_dkdv(
                dk, dv, q, dout, pivot, delta, None, j, k, v, None, scale_log2, softcap_log2
            )
        for t in range(edges + more):
            i = tl.arange(0, BLOCK_M)
            if rows_ptr is not None:
                at = skipped + t * BLOCK_M + i
                is_row = at < listed
                i = tl.load(rows_ptr + start + at, mask=is_row, other=0)
                first_i = 0 * t
                R = i + offset
                i = i.to(tl.int64)
            else:
                first_R = low0 + tl.where(t < edges, t, t + whole) * BLOCK_M
                R = first_R + i
                is_row = n_rows > R - R0
                first_i = first_R - R0
                if CLASSES:
                    first_i = i0 + step * first_i
                    i = (step * i).to(tl.int64)
            q, dout, pivot, delta = _load_row_tile(
                q_head, dout_ptr + at_head * DV, pivot_ptr + at_pivot, delta_ptr + at_pivot,
                flags_head, first_i, i, is_row, q_stride_t, H, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            visible = (R[None, :] >= low[:, None]) & (R[None, :] < high[:, None])
            if KIND != CLASS and DILATED:
                visible = visible & ((R[None, :] - j[:, None]) % dilation == 0)
            cut = None
            if cuts_ptr is not None:
                cut = tl.load(cuts_ptr + at_pivot + first_i + i, mask=is_row, other=0)
            dk, dv = _add_dkdv(
                dk, dv, q, dout, pivot, delta, cut, j, k, v, visible, scale_log2, softcap_log2
            )

    dk = tl.where(is_here[:, None], dk * _score_scale(scale_log2, softcap_log2), 0.0)
    dv = tl.where(is_here[:, None], dv, 0.0)
    at_key = (flat * Tk + keys) * tl.num_programs(1) + key_head
    if ACCUMULATE:
        dk += load_rows(dk_ptr, at_key, D, is_key, D, BLOCK_D)
        dv += load_rows(dv_ptr, at_key, DV, is_key, DV, BLOCK_DV)
    store_rows(dk_ptr, at_key, D, dk, is_key, D, BLOCK_D)
    store_rows(dv_ptr, at_key, DV, dv, is_key, DV, BLOCK_DV)
