"""Triton forward of linear attention: sums of decays, pairs of a chunk, states, outputs.

Of the formulas of ``reference.py`` the pairs and the outputs of all chunks are made in parallel,
their states one after the other. ``launch.py`` starts the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.linear_attention.tiles import (
    CHANNELS,
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
def _linear_attention_sums_kernel(
    # tensors: log_decay, sums [rows N], of N heads or channels of heads
    log_decay_ptr, sums_ptr,
    # int32 [chunks 2] or None: first token and number of each chunk
    chunks_ptr,
    # sizes and scalars
    T, n, N, least,
    # compile-time
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, first, count = open_chunk(chunks_ptr, tl.program_id(0), T, n, BLOCK_T)
    lanes = tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (lanes < count)[:, None] & (cols < N)[None, :]
    at = (b * T + first + lanes)[:, None] * N + cols[None, :]
    decay = tl.load(log_decay_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_N]
    tl.store(sums_ptr + at, tl.cumsum(tl.maximum(decay, least), axis=0), mask=mask)


@triton.jit
def _linear_attention_pairs_kernel(
    # tensors: x [B T heads D], q or k; k [B T Hk D]; g [rows Hk] or [rows Hk D]; beta [rows Hk];
    # pairs [chunks heads BLOCK_T BLOCK_T]
    x_ptr, k_ptr, g_ptr, beta_ptr, pairs_ptr,
    # int32 [chunks 2] or None
    chunks_ptr,
    # strides, in elements
    x_stride_b, x_stride_t, x_stride_h, k_stride_b, k_stride_t, k_stride_h,
    # sizes and scalars
    T, n, Hk, group, levels, scale,
    # compile-time
    D: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weigh the keys of a chunk for its queries, or invert I + diag(beta) (those for its keys)."""
    c = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // group
    b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
    if count <= 0:
        return
    lanes = tl.arange(0, BLOCK_T)
    is_row = lanes < count
    flat = b * T + first
    x_ptr += b * x_stride_b + first * x_stride_t + head * x_stride_h
    k_ptr += b * k_stride_b + first * k_stride_t + key_head * k_stride_h
    is_diagonal = lanes[:, None] == lanes[None, :]
    inverse = tl.where(is_diagonal, 1.0, 0.0)
    beta = scale
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + (flat + lanes) * Hk + key_head, mask=is_row, other=0.0)
        beta = beta.to(tl.float32)[:, None]

    weights = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    if DECAY != CHANNELS:
        for d in range(0, D, BLOCK_D):
            x = load_tile(x_ptr, lanes, x_stride_t, is_row, d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
            k = load_tile(k_ptr, lanes, k_stride_t, is_row, d, D, BLOCK_D)
            weights = tl.dot(x, tl.trans(k), weights, input_precision=PRECISION)
        g = load_sums(g_ptr, flat, lanes, is_row, key_head, Hk, 0, D, BLOCK_D, DECAY)
        is_seen = (lanes[:, None] >= lanes[None, :]) & is_row[:, None]
        weights *= pair_decay(g, is_seen, DECAY)
    elif beta_ptr is None:
        for d in range(0, D, BLOCK_D):
            x = load_tile(x_ptr, lanes, x_stride_t, is_row, d, D, BLOCK_D)
            k = load_tile(k_ptr, lanes, k_stride_t, is_row, d, D, BLOCK_D)
            weights += tl.where(is_diagonal, tl.sum(x * k, axis=1)[:, None], 0.0)

    if (DECAY == CHANNELS) or (beta_ptr is not None):
        for level in range(levels):
            here = of_level(level, BLOCK_T)
            part = weights
            if DECAY == CHANNELS:
                part = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
                for d in range(0, D, BLOCK_D):
                    x = load_tile(x_ptr, lanes, x_stride_t, is_row, d, D, BLOCK_D)
                    k = load_tile(k_ptr, lanes, k_stride_t, is_row, d, D, BLOCK_D)
                    g = load_sums(g_ptr, flat, lanes, is_row, key_head, Hk, d, D, BLOCK_D, DECAY)
                    since, until = level_decay(
                        g_ptr, g, flat, count, level, key_head, Hk, d, D, BLOCK_D, BLOCK_T
                    )
                    part = tl.dot(
                        x * since, tl.trans(k * until), part, input_precision=PRECISION
                    )  # [BLOCK_T, BLOCK_T]
            part = tl.where(here, part, 0.0)
            if beta_ptr is not None:
                # of two neighbouring blocks that are inverted: (0 0; part 0) lies between them
                between = tl.dot(inverse, beta * part, input_precision=PRECISION)
                inverse -= tl.dot(between, inverse, input_precision=PRECISION)
            else:
                weights += part
    if beta_ptr is not None:
        weights = inverse
    else:
        weights *= scale
    at = c.to(tl.int64) * tl.num_programs(1) + head
    store_square(pairs_ptr, at, weights, BLOCK_T)


@triton.jit
def _linear_attention_states_kernel(
    # tensors: k [B T Hk D]; v [B T Hk DV]; g [rows Hk] or [rows Hk D]; beta [rows Hk];
    # inverse [chunks Hk BLOCK_T BLOCK_T]; initial, last [B Hk D DV] float32
    k_ptr, v_ptr, g_ptr, beta_ptr, inverse_ptr, initial_ptr, last_ptr,
    # u [rows Hk DV], what the tokens write; states [chunks Hk D DV], in front of each chunk
    u_ptr, states_ptr,
    # int32 [chunks 2], int32 [B + 1] or None: the chunks, the first of each sequence
    chunks_ptr, starts_ptr,
    # strides, in elements
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes
    T, n,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Take the chunks of a sequence one after the other, and a state by tiles of its rows.

    What a program writes to ``states`` it reads behind a barrier: whole, a state and what is
    multiplied by it exceed the registers.
    """
    first_v = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    Hk = tl.num_programs(1)
    sequence = tl.program_id(2)
    lanes = tl.arange(0, BLOCK_T)
    at_state = (sequence.to(tl.int64) * Hk + head) * D * DV
    start, end = chunk_range(starts_ptr, sequence, n)
    at = tl.cast(start, tl.int64) * Hk + head
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
        if initial_ptr is not None:
            state = load_tile(initial_ptr + at_state, dims, DV, dims < D, first_v, DV, BLOCK_V)
        store_state(
            states_ptr + at * D * DV, last_ptr + at_state, start < end, state, dims, first_v, D, DV,
            BLOCK_V,
        )  # fmt: skip
    for c in range(start, end):
        tl.debug_barrier()
        b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
        is_row = lanes < count
        flat = b * T + first
        at = tl.cast(c, tl.int64) * Hk + head
        state_ptr = states_ptr + at * D * DV
        next_ptr = states_ptr + (at + Hk) * D * DV
        k_at = k_ptr + b * k_stride_b + first * k_stride_t + head * k_stride_h
        v_at = v_ptr + b * v_stride_b + first * v_stride_t + head * v_stride_h
        u = load_tile(v_at, lanes, v_stride_t, is_row, first_v, DV, BLOCK_V)  # [BLOCK_T, BLOCK_V]
        if beta_ptr is not None:
            for d in range(0, D, BLOCK_D):
                dims = d + tl.arange(0, BLOCK_D)
                k = load_tile(k_at, lanes, k_stride_t, is_row, d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
                g = load_sums(g_ptr, flat, lanes, is_row, head, Hk, d, D, BLOCK_D, DECAY)
                state = load_tile(state_ptr, dims, DV, dims < D, first_v, DV, BLOCK_V)
                u = tl.dot(k * -tl.exp(g), state, u, input_precision=PRECISION)
            beta = tl.load(beta_ptr + (flat + lanes) * Hk + head, mask=is_row, other=0.0)
            inverse = load_square(inverse_ptr, at, BLOCK_T)  # [BLOCK_T, BLOCK_T]
            u = tl.dot(inverse, beta.to(tl.float32)[:, None] * u, input_precision=PRECISION)
            store_tile(
                u_ptr + (flat * Hk + head) * DV, lanes, Hk * DV, u, is_row, first_v, DV, BLOCK_V
            )
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            k = load_tile(k_at, lanes, k_stride_t, is_row, d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
            g = load_sums(g_ptr, flat, lanes, is_row, head, Hk, d, D, BLOCK_D, DECAY)
            whole = load_whole(g_ptr, flat + count - 1, head, Hk, d, D, BLOCK_D, DECAY)
            state = load_tile(state_ptr, dims, DV, dims < D, first_v, DV, BLOCK_V)
            state *= tl.exp(whole)[:, None]
            late = tl.trans(k * tl.exp(whole[None, :] - g))
            state = tl.dot(late, u, state, input_precision=PRECISION)  # [BLOCK_D, BLOCK_V]
            store_state(
                next_ptr, last_ptr + at_state, c + 1 < end, state, dims, first_v, D, DV, BLOCK_V
            )


@triton.jit
def _linear_attention_out_kernel(
    # tensors: q [B T H D]; u [B T Hk DV]; g [rows Hk] or [rows Hk D]; pairs [chunks H BLOCK_T ..];
    # states [chunks Hk D DV]; out [rows H DV]
    q_ptr, u_ptr, g_ptr, pairs_ptr, states_ptr, out_ptr,
    # int32 [chunks 2] or None
    chunks_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, u_stride_b, u_stride_t, u_stride_h,
    # sizes and scalars
    T, n, group, scale,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    head = tl.program_id(1)
    first_v = tl.program_id(2) * BLOCK_V
    H = tl.num_programs(1)
    Hk = H // group
    key_head = head // group
    b, first, count = open_chunk(chunks_ptr, c, T, n, BLOCK_T)
    if count <= 0:
        return
    lanes = tl.arange(0, BLOCK_T)
    is_row = lanes < count
    flat = b * T + first
    q_ptr += b * q_stride_b + first * q_stride_t + head * q_stride_h
    u_ptr += b * u_stride_b + first * u_stride_t + key_head * u_stride_h
    states_ptr += (c.to(tl.int64) * Hk + key_head) * D * DV

    out = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        q = load_tile(q_ptr, lanes, q_stride_t, is_row, d, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
        g = load_sums(g_ptr, flat, lanes, is_row, key_head, Hk, d, D, BLOCK_D, DECAY)
        state = load_tile(states_ptr, dims, DV, dims < D, first_v, DV, BLOCK_V)
        q *= scale * tl.exp(g)
        out = tl.dot(q, state, out, input_precision=PRECISION)  # [BLOCK_T, BLOCK_V]
    pairs = load_square(pairs_ptr, c.to(tl.int64) * H + head, BLOCK_T)
    u = load_tile(u_ptr, lanes, u_stride_t, is_row, first_v, DV, BLOCK_V)
    out = tl.dot(pairs, u, out, input_precision=PRECISION)
    store_tile(out_ptr + (flat * H + head) * DV, lanes, H * DV, out, is_row, first_v, DV, BLOCK_V)
