"""Triton backward of linear attention: states in reverse, pairs of a chunk, then its tokens.

The formulas are those of ``reference_backward.py``; u, the pairs and the states in front of each
chunk are made again by the kernels of the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.linear_attention.tiles import (
    CHANNELS,
    HEADS,
    NONE,
    chunk_range,
    level_decay,
    load_square,
    load_sums,
    load_tile,
    load_whole,
    of_level,
    open_chunk,
    pair_decay,
    store_square,
    store_state,
    store_tile,
)


@triton.jit
def _linear_attention_bwd_states_kernel(
    # tensors: q [B T H D]; k [B T Hk D]; dout [rows H DV]; g [rows Hk] or [rows Hk D];
    # beta [rows Hk]; pairs [chunks H BLOCK_T BLOCK_T]; inverse [chunks Hk BLOCK_T BLOCK_T]
    q_ptr, k_ptr, dout_ptr, g_ptr, beta_ptr, pairs_ptr, inverse_ptr,
    # dlast, dinitial [B Hk D DV] float32 or None; dv [rows Hk DV]; w as dv, float32;
    # dstates [chunks Hk D DV]: gradients of the states behind each chunk
    dlast_ptr, dinitial_ptr, dv_ptr, w_ptr, dstates_ptr,
    # int32 [chunks 2], int32 [B + 1] or None: the chunks, the first of each sequence
    chunks_ptr, starts_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    # sizes and scalars
    T, n, group, scale,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Take the chunks of a sequence in reverse, as the kernel of the states does in order."""
    first_v = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    Hk = tl.num_programs(1)
    H = Hk * group
    sequence = tl.program_id(2)
    lanes = tl.arange(0, BLOCK_T)
    at_state = (sequence.to(tl.int64) * Hk + head) * D * DV
    edge_ptr = dinitial_ptr
    if dinitial_ptr is not None:
        edge_ptr = dinitial_ptr + at_state
    start, end = chunk_range(starts_ptr, sequence, n)
    at = tl.cast(end - 1, tl.int64) * Hk + head
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        dstate = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
        if dlast_ptr is not None:
            dstate = load_tile(dlast_ptr + at_state, dims, DV, dims < D, first_v, DV, BLOCK_V)
        store_state(
            dstates_ptr + at * D * DV, edge_ptr, start < end, dstate, dims, first_v, D, DV, BLOCK_V
        )
    for i in range(start, end):
        tl.debug_barrier()
        c = start + end - 1 - i
        b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
        is_row = lanes < count
        flat = b * T + first
        at = tl.cast(c, tl.int64) * Hk + head
        dstate_ptr = dstates_ptr + at * D * DV
        next_ptr = dstates_ptr + (at - Hk) * D * DV
        k_at = k_ptr + b * k_stride_b + first * k_stride_t + head * k_stride_h
        q_at = q_ptr + b * q_stride_b + first * q_stride_t + head * group * q_stride_h
        dout_at = dout_ptr + (flat * H + head * group) * DV
        w = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            k = load_tile(k_at, lanes, k_stride_t, is_row, d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
            g = load_sums(g_ptr, flat, lanes, is_row, head, Hk, d, D, BLOCK_D, DECAY)
            whole = load_whole(g_ptr, flat + count - 1, head, Hk, d, D, BLOCK_D, DECAY)
            dstate = load_tile(dstate_ptr, dims, DV, dims < D, first_v, DV, BLOCK_V)
            w = tl.dot(k * tl.exp(whole[None, :] - g), dstate, w, input_precision=PRECISION)
        for member in range(group):
            dout = load_tile(
                dout_at + member * DV, lanes, H * DV, is_row, first_v, DV, BLOCK_V
            )  # [BLOCK_T, BLOCK_V]
            pairs = load_square(
                pairs_ptr, tl.cast(c, tl.int64) * H + head * group + member, BLOCK_T
            )
            w = tl.dot(tl.trans(pairs), dout, w, input_precision=PRECISION)  # [BLOCK_T, BLOCK_V]
        dv = w
        at_value = (flat * Hk + head) * DV
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + (flat + lanes) * Hk + head, mask=is_row, other=0.0)
            inverse = load_square(inverse_ptr, at, BLOCK_T)
            w = tl.dot(tl.trans(inverse), w, input_precision=PRECISION)
            store_tile(w_ptr + at_value, lanes, Hk * DV, w, is_row, first_v, DV, BLOCK_V)
            dv = beta.to(tl.float32)[:, None] * w
        store_tile(dv_ptr + at_value, lanes, Hk * DV, dv, is_row, first_v, DV, BLOCK_V)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            g = load_sums(g_ptr, flat, lanes, is_row, head, Hk, d, D, BLOCK_D, DECAY)
            whole = load_whole(g_ptr, flat + count - 1, head, Hk, d, D, BLOCK_D, DECAY)
            dstate = load_tile(dstate_ptr, dims, DV, dims < D, first_v, DV, BLOCK_V)
            dstate *= tl.exp(whole)[:, None]
            if beta_ptr is not None:
                k = load_tile(k_at, lanes, k_stride_t, is_row, d, D, BLOCK_D)
                early = tl.trans(k * -tl.exp(g))
                dstate = tl.dot(early, dv, dstate, input_precision=PRECISION)
            for member in range(group):
                q = load_tile(
                    q_at + member * q_stride_h, lanes, q_stride_t, is_row, d, D, BLOCK_D
                )  # [BLOCK_T, BLOCK_D]
                dout = load_tile(dout_at + member * DV, lanes, H * DV, is_row, first_v, DV, BLOCK_V)
                q *= scale * tl.exp(g)
                dstate = tl.dot(tl.trans(q), dout, dstate, input_precision=PRECISION)
            store_state(next_ptr, edge_ptr, c > start, dstate, dims, first_v, D, DV, BLOCK_V)


@triton.jit
def _linear_attention_bwd_pairs_kernel(
    # tensors: x [rows heads DV], dout or w; u, v [B T Hk DV]; dpairs [chunks heads BLOCK_T ..];
    # dbeta [rows Hk] float32, or None
    x_ptr, u_ptr, v_ptr, dpairs_ptr, dbeta_ptr,
    # int32 [chunks 2] or None
    chunks_ptr,
    # strides, in elements
    u_stride_b, u_stride_t, u_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes
    T, n, group,
    # compile-time
    DV: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Multiply the gradients of what reads by what the tokens wrote; w by v as well."""
    c = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    key_head = head // group
    b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
    if count <= 0:
        return
    lanes = tl.arange(0, BLOCK_T)
    is_row = lanes < count
    flat = b * T + first
    x_ptr += (flat * heads + head) * DV
    u_ptr += b * u_stride_b + first * u_stride_t + key_head * u_stride_h
    v_ptr += b * v_stride_b + first * v_stride_t + key_head * v_stride_h
    pairs = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    products = tl.zeros((BLOCK_T,), tl.float32)
    for d in range(0, DV, BLOCK_V):
        x = load_tile(x_ptr, lanes, heads * DV, is_row, d, DV, BLOCK_V)  # [BLOCK_T, BLOCK_V]
        u = load_tile(u_ptr, lanes, u_stride_t, is_row, d, DV, BLOCK_V)
        pairs = tl.dot(x, tl.trans(u), pairs, input_precision=PRECISION)  # [BLOCK_T, BLOCK_T]
        if dbeta_ptr is not None:
            v = load_tile(v_ptr, lanes, v_stride_t, is_row, d, DV, BLOCK_V)
            products += tl.sum(x * v, axis=1)
    is_seen = lanes[:, None] >= lanes[None, :]
    if dbeta_ptr is not None:
        is_seen = lanes[:, None] > lanes[None, :]
        tl.store(dbeta_ptr + (flat + lanes) * heads + head, products, mask=is_row)
    at = c.to(tl.int64) * heads + head
    store_square(dpairs_ptr, at, tl.where(is_seen, pairs, 0.0), BLOCK_T)


@triton.jit
def _through_pairs(
    dpairs, x, k, decay, g_ptr, g, flat, count, head, Hk, first, levels, DIAGONAL: tl.constexpr,
    D: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return the gradients of x and k [BLOCK_T BLOCK_D] from that of their pairs."""
    if DECAY == CHANNELS:
        dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dk = dx
        if DIAGONAL:
            lanes = tl.arange(0, BLOCK_T)
            own = tl.sum(tl.where(lanes[:, None] == lanes[None, :], dpairs, 0.0), axis=1)[:, None]
            dx = own * k
            dk = own * x
        for level in range(levels):
            part = tl.where(of_level(level, BLOCK_T), dpairs, 0.0)
            since, until = level_decay(
                g_ptr, g, flat, count, level, head, Hk, first, D, BLOCK_D, BLOCK_T
            )
            dx += since * tl.dot(part, k * until, input_precision=PRECISION)
            dk += until * tl.dot(tl.trans(part), x * since, input_precision=PRECISION)
    else:
        dpairs *= decay
        dx = tl.dot(dpairs, k, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dpairs), x, input_precision=PRECISION)
    return dx, dk


@triton.jit
def _linear_attention_bwd_keys_kernel(
    # tensors: q [B T H D]; k [B T Hk D]; u [B T Hk DV]; dout [rows H DV]; g [rows Hk] or
    # [rows Hk D]; beta [rows Hk]; w [rows Hk DV]; states, dstates [chunks Hk D DV]
    q_ptr, k_ptr, u_ptr, dout_ptr, g_ptr, beta_ptr, w_ptr, states_ptr, dstates_ptr,
    # gradients of pairs of queries [chunks H BLOCK_T BLOCK_T] and of keys [chunks Hk ..]
    dpairs_ptr, dkeys_ptr,
    # dq [rows H D]; dk [rows Hk D]; float32: dlog_decay [rows Hk D] or [tiles of D rows Hk];
    # dbeta [tiles of D rows Hk]
    dq_ptr, dk_ptr, dlog_decay_ptr, dbeta_ptr,
    # int32 [chunks 2] or None
    chunks_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    u_stride_b, u_stride_t, u_stride_h,
    # sizes and scalars
    T, n, rows, group, levels, scale,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    head = tl.program_id(1)
    Hk = tl.num_programs(1)
    H = Hk * group
    tile = tl.program_id(2)
    first_d = tile * BLOCK_D
    b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
    if count <= 0:
        return
    lanes = tl.arange(0, BLOCK_T)
    is_row = lanes < count
    dims = first_d + tl.arange(0, BLOCK_D)
    is_dim = dims < D
    flat = b * T + first
    at = c.to(tl.int64) * Hk + head
    k_ptr += b * k_stride_b + first * k_stride_t + head * k_stride_h
    u_ptr += b * u_stride_b + first * u_stride_t + head * u_stride_h
    states_ptr += at * D * DV
    dstates_ptr += at * D * DV
    k = load_tile(k_ptr, lanes, k_stride_t, is_row, first_d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
    g = load_sums(g_ptr, flat, lanes, is_row, head, Hk, first_d, D, BLOCK_D, DECAY)
    whole = load_whole(g_ptr, flat + count - 1, head, Hk, first_d, D, BLOCK_D, DECAY)
    decay = k
    if DECAY != CHANNELS:
        is_seen = (lanes[:, None] >= lanes[None, :]) & is_row[:, None]
        decay = pair_decay(g, is_seen, DECAY)

    # dk of keys as what the state is read with, and as what is written to it
    late = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    kept = tl.zeros((BLOCK_D,), tl.float32)
    for v in range(0, DV, BLOCK_V):
        u = load_tile(u_ptr, lanes, u_stride_t, is_row, v, DV, BLOCK_V)  # [BLOCK_T, BLOCK_V]
        dstate = load_tile(dstates_ptr, dims, DV, is_dim, v, DV, BLOCK_V)  # [BLOCK_D, BLOCK_V]
        late = tl.dot(u, tl.trans(dstate), late, input_precision=PRECISION)
        if DECAY != NONE:
            state = load_tile(states_ptr, dims, DV, is_dim, v, DV, BLOCK_V)
            kept += tl.sum(state * dstate, axis=1)
    # what all decays of the chunk change together
    written = late * tl.exp(whole[None, :] - g)
    behind = tl.sum(k * written, axis=0) + tl.exp(whole) * kept
    read = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dsums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + (flat + lanes) * Hk + head, mask=is_row, other=0.0)
        beta = beta.to(tl.float32)[:, None]
        w_ptr += (flat * Hk + head) * DV
        for v in range(0, DV, BLOCK_V):
            w = load_tile(w_ptr, lanes, Hk * DV, is_row, v, DV, BLOCK_V)
            state = load_tile(states_ptr, dims, DV, is_dim, v, DV, BLOCK_V)
            read = tl.dot(w, tl.trans(state), read, input_precision=PRECISION)
        # of diag(beta) (those for its keys): x is beta k
        dkeys = load_square(dkeys_ptr, at, BLOCK_T)
        dx, dk = _through_pairs(
            dkeys, beta * k, k, decay, g_ptr, g, flat, count, head, Hk, first_d, levels,
            False, D, DECAY, PRECISION, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        read = read * tl.exp(g) + dx
        dbeta = -tl.sum(k * read, axis=1)
        at_row = (tile.to(tl.int64) * rows + flat + lanes) * Hk + head
        tl.store(dbeta_ptr + at_row, dbeta, mask=is_row)
        read *= -beta
        written -= dk
    for member in range(group):
        query_head = head * group + member
        q_at = q_ptr + b * q_stride_b + first * q_stride_t + query_head * q_stride_h
        q = scale * load_tile(q_at, lanes, q_stride_t, is_row, first_d, D, BLOCK_D)
        dout_at = dout_ptr + (flat * H + query_head) * DV
        dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for v in range(0, DV, BLOCK_V):
            dout = load_tile(dout_at, lanes, H * DV, is_row, v, DV, BLOCK_V)
            state = load_tile(states_ptr, dims, DV, is_dim, v, DV, BLOCK_V)
            dq = tl.dot(dout, tl.trans(state), dq, input_precision=PRECISION)
        dpairs = load_square(dpairs_ptr, c.to(tl.int64) * H + query_head, BLOCK_T)
        dx, dk = _through_pairs(
            dpairs, q, k, decay, g_ptr, g, flat, count, head, Hk, first_d, levels,
            True, D, DECAY, PRECISION, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        dq = dq * tl.exp(g) + dx
        written += dk
        dsums += q * dq
        store_tile(
            dq_ptr + (flat * H + query_head) * D, lanes, H * D, scale * dq, is_row, first_d, D,
            BLOCK_D,
        )  # fmt: skip
    store_tile(
        dk_ptr + (flat * Hk + head) * D, lanes, Hk * D, read + written, is_row, first_d, D, BLOCK_D
    )
    if DECAY != NONE:
        dsums += k * (read - written)
        dsums += tl.where((lanes == count - 1)[:, None], behind[None, :], 0.0)
        if DECAY == HEADS:
            total = tl.cumsum(tl.sum(dsums, axis=1), axis=0, reverse=True)
            at_row = (tile.to(tl.int64) * rows + flat + lanes) * Hk + head
            tl.store(dlog_decay_ptr + at_row, total, mask=is_row)
        else:
            total = tl.cumsum(dsums, axis=0, reverse=True)
            store_tile(
                dlog_decay_ptr + (flat * Hk + head) * D, lanes, Hk * D, total, is_row, first_d, D,
                BLOCK_D,
            )  # fmt: skip
