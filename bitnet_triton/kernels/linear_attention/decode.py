"""Triton recurrence of linear attention: one program takes some columns of a state, token by token.

For few tokens: the state is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.linear_attention.reference import LEAST_LOG_DECAY
from bitnet_triton.kernels.linear_attention.tiles import (
    CHANNELS,
    NONE,
    load_tile,
    store_tile,
)
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _linear_attention_decode_kernel(
    # tensors: q [B T H D]; k [B T Hk D]; v [B T Hk DV]; log_decay [B T Hk] or [B T Hk D] or None;
    # beta [B T Hk] or None; before [B Hk D DV] float32 or None, after as before; out [B T H DV]
    q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, before_ptr, after_ptr, out_ptr,
    # int32 [B] or None: which of two states [2 B Hk D DV] is the one before; the other one is after
    turn_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars
    T, scale, least,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DECAY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    first_v = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    Hk = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    cols = first_v + tl.arange(0, BLOCK_V)
    is_col = cols < DV
    at_state = (b * Hk + head) * D * DV
    at_after = at_state
    if turn_ptr is not None:
        size = tl.num_programs(2).to(tl.int64) * Hk * D * DV
        turn = tl.load(turn_ptr + b)
        at_after += (1 - turn) * size
        at_state += turn * size
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    if before_ptr is not None:
        state = load_tile(before_ptr + at_state, dims, DV, is_dim, first_v, DV, BLOCK_V)
    for t in range(T):
        row = b * T + t
        k_at = k_ptr + b * k_stride_b + t * k_stride_t + head * k_stride_h
        v_at = v_ptr + b * v_stride_b + t * v_stride_t + head * v_stride_h
        k = tl.load(k_at + dims, mask=is_dim, other=0.0).to(tl.float32)  # [BLOCK_D]
        v = tl.load(v_at + cols, mask=is_col, other=0.0).to(tl.float32)  # [BLOCK_V]
        if DECAY == CHANNELS:
            at = log_decay_ptr + (row * Hk + head) * D + dims
            decay = tl.load(at, mask=is_dim, other=0.0).to(tl.float32)
            state *= tl.exp(tl.maximum(decay, least))[:, None]
        elif DECAY != NONE:
            decay = tl.load(log_decay_ptr + row * Hk + head).to(tl.float32)
            state *= tl.exp(tl.maximum(decay, least))
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + row * Hk + head).to(tl.float32)
            v = beta * (v - tl.sum(state * k[:, None], axis=0))
        state += k[:, None] * v[None, :]
        for member in range(GROUP):
            query_head = head * GROUP + member
            q_at = q_ptr + b * q_stride_b + t * q_stride_t + query_head * q_stride_h
            q = tl.load(q_at + dims, mask=is_dim, other=0.0).to(tl.float32)
            out = scale * tl.sum(state * q[:, None], axis=0)
            out_at = out_ptr + (row * Hk * GROUP + query_head) * DV + cols
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_col)
    store_tile(after_ptr + at_after, dims, DV, state, is_dim, first_v, DV, BLOCK_V)


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    before: Tensor | None,
    after: Tensor,
    out: Tensor | None = None,
    turn: Tensor | None = None,
) -> Tensor:
    """Take T tokens after the state ``before``, by one launch; return ``out`` [B T H Dv].

    Args:
        q: [B T H D].
        k: [B T Hk D].
        v: [B T Hk Dv].
        log_decay: [B T Hk] or [B T Hk D], contiguous.
        beta: [B T Hk], contiguous.
        scale: multiplies ``q``.
        before: float32 [B Hk D Dv]; None: zeros.
        after: gets the state behind the tokens; may be ``before``.
        out: is written; None: a new tensor in the dtype of ``q``.
        turn: int32 [B]; where given, ``before`` and ``after`` are the same two states
            [2 B Hk D Dv], and this says which one is read: a launch may then be done again.
    """
    (B, T, H, D), (Hk, DV) = q.shape, v.shape[2:]
    if out is None:
        out = torch.empty((B, T, H, DV), dtype=q.dtype, device=q.device)
    config = tiles("linear_attention_decode", D, q.device)
    launch(_linear_attention_decode_kernel, (cdiv(DV, config["BLOCK_V"]), Hk, B))(
        q, k, v, log_decay, beta, before, after, out, turn,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T, scale, LEAST_LOG_DECAY,
        GROUP=H // Hk, D=D, DV=DV, DECAY=0 if log_decay is None else log_decay.ndim - 2,
        **config, **dependent(q.device),
    )  # fmt: skip
    return out
