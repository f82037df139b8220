"""Triton kernels around the recurrence of one token: all of a layer's decode step, by launches.

They do what ``attention/linear_parts.py`` does for many tokens, and round where that rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.linear_attention.decode import launch_decode
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles

_EPS = tl.constexpr(1e-6)
# softplus is the identity beyond, as in PyTorch
_STRAIGHT = tl.constexpr(20.0)


class GatedStep(NamedTuple):
    """Parameters of a gated layer, where they lie; shapes as in ``GatedParts``.

    Attributes:
        inputs: [Hk + I + D, K], I = D where channels decay by themselves, else Hk.
        decay_out: [Hk D, D] or None.
        gate_out: [H D, D].
        gate_bias: [H D].
        log_rate: [Hk].
        decay_bias: [Hk] or [Hk D].
        convolution: [C taps] or None.
        norm: [D].
    """

    inputs: Tensor
    decay_out: Tensor | None
    gate_out: Tensor
    gate_bias: Tensor
    log_rate: Tensor
    decay_bias: Tensor
    convolution: Tensor | None
    norm: Tensor


@triton.jit
def _project_row_kernel(
    # tensors: x [B K], rows of any stride; weight [N K]; y [B N]
    x_ptr, weight_ptr, y_ptr,
    # strides, in elements
    x_stride_b,
    # sizes
    N, K,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_row = start + cols < K
        x = tl.load(x_ptr + b * x_stride_b + start + cols, mask=in_row, other=0.0).to(tl.float32)
        at = weight_ptr + n[:, None] * K + (start + cols)[None, :]
        weight = tl.load(at, mask=(n < N)[:, None] & in_row[None, :], other=0.0)
        total += weight.to(tl.float32) * x[None, :]  # [BLOCK_N, BLOCK_K]
    y = tl.sum(total, axis=1).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + b * N + n, y, mask=n < N)


@triton.jit
def _short_convolution_kernel(
    # tensors: heads, mixed [B H + 2 Hk D]; tails [2 B TAPS - 1, C], C = (H + 2 Hk) D, or None;
    # weight [C TAPS] or None; int32 [B]: turn, which of the tails is read, and the other written;
    # is_token, 0 for padding
    heads_ptr, tails_ptr, weight_ptr, mixed_ptr, turn_ptr, is_token_ptr,
    # sizes
    KEYED,  # heads of queries and keys, which get length 1
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Sum the latest inputs of one head, remember the newest, and norm queries and keys."""
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(0)
    C = tl.num_programs(0) * D
    b = tl.program_id(1).to(tl.int64)
    kind = mixed_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    c = head * D + dims
    is_token = tl.load(is_token_ptr + b) > 0
    new = tl.load(heads_ptr + b * C + c, mask=is_dim & is_token, other=0.0)
    x = new.to(tl.float32)
    if TAPS > 1:
        turn = tl.load(turn_ptr + b)
        size = tl.num_programs(1).to(tl.int64) * (TAPS - 1) * C
        at = tails_ptr + turn * size + b * (TAPS - 1) * C + c
        to = tails_ptr + (1 - turn) * size + b * (TAPS - 1) * C + c
        w = weight_ptr + c * TAPS
        x *= tl.load(w + TAPS - 1, mask=is_dim, other=0.0).to(tl.float32)
        for back in tl.static_range(1, TAPS):
            former = tl.load(at + (TAPS - 1 - back) * C, mask=is_dim, other=0.0).to(tl.float32)
            x += former * tl.load(w + TAPS - 1 - back, mask=is_dim, other=0.0).to(tl.float32)
        for r in tl.static_range(TAPS - 2):
            tl.store(to + r * C, tl.load(at + (r + 1) * C, mask=is_dim, other=0.0), mask=is_dim)
        tl.store(to + (TAPS - 2) * C, new, mask=is_dim)
        x = (x * tl.sigmoid(x)).to(kind).to(tl.float32)
    if head < KEYED:
        x *= 1.0 / tl.sqrt(tl.sum(tl.where(is_dim, x * x, 0.0), axis=0) + _EPS)
    tl.store(mixed_ptr + b * C + c, x.to(kind), mask=is_dim)


@triton.jit
def _gating_kernel(
    # tensors: inner [B N], whose first Hk columns are beta's and the next Hk the decay's; channels
    # [B Hk D] or None: the decay's instead; log_rate [Hk]; bias [Hk] or [Hk D]; beta float32
    # [B Hk]; log_decay float32 [B Hk] or [B Hk D]; is_token int32 [B], 0 for padding, which leaves
    # the state as it is
    inner_ptr, channels_ptr, log_rate_ptr, bias_ptr, beta_ptr, log_decay_ptr, is_token_ptr,
    # sizes
    N,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(0)
    Hk = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    beta = tl.load(inner_ptr + b * N + head).to(tl.float32)
    is_token = tl.load(is_token_ptr + b).to(tl.float32)
    tl.store(beta_ptr + b * Hk + head, is_token * tl.sigmoid(beta))
    rate = -is_token * tl.exp(tl.load(log_rate_ptr + head).to(tl.float32))
    if channels_ptr is None:
        x = tl.load(inner_ptr + b * N + Hk + head).to(tl.float32)
        x += tl.load(bias_ptr + head).to(tl.float32)
        soft = tl.where(x > _STRAIGHT, x, tl.log(1.0 + tl.exp(tl.minimum(x, _STRAIGHT))))
        tl.store(log_decay_ptr + b * Hk + head, rate * soft)
    else:
        dims = tl.arange(0, BLOCK_D)
        c = head * D + dims
        x = tl.load(channels_ptr + b * Hk * D + c, mask=dims < D, other=0.0).to(tl.float32)
        x += tl.load(bias_ptr + c, mask=dims < D, other=0.0).to(tl.float32)
        soft = tl.where(x > _STRAIGHT, x, tl.log(1.0 + tl.exp(tl.minimum(x, _STRAIGHT))))
        tl.store(log_decay_ptr + b * Hk * D + c, rate * soft, mask=dims < D)


@triton.jit
def _gated_norm_kernel(
    # tensors: x, gate, out [B H D]; bias [H D]; weight [D]
    x_ptr, gate_ptr, bias_ptr, weight_ptr, out_ptr,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    row = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    x = tl.load(x_ptr + row + dims, mask=is_dim, other=0.0).to(tl.float32)
    x *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + _EPS)
    gate = tl.load(gate_ptr + row + dims, mask=is_dim, other=0.0).to(tl.float32)
    at = bias_ptr + tl.program_id(0) * D + dims
    gate += tl.load(at, mask=is_dim, other=0.0).to(tl.float32)
    x *= tl.load(weight_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    x *= gate * tl.sigmoid(gate)
    tl.store(out_ptr + row + dims, x.to(out_ptr.dtype.element_ty), mask=is_dim)


def launch_gated_step(
    heads: Tensor,
    hidden_states: Tensor,
    parts: GatedStep,
    *,
    kv_heads: int,
    scale: float,
    states: Tensor,
    tails: Tensor | None,
    turn: Tensor,
    is_token: Tensor,
) -> Tensor:
    """Take one token a row into a state, by launches alone; return [B 1 H D].

    There are two of everything that it changes: done twice, it is as done once.

    Args:
        heads: [B 1 H + 2 Hk D], contiguous: queries, keys and values, not rotated.
        hidden_states: [B 1 K].
        parts: parameters.
        kv_heads: Hk.
        scale: multiplies the queries.
        states: float32 [2 B Hk D D], contiguous.
        tails: [2 B taps - 1, C], contiguous, of the convolution; None without one.
        turn: int32 [B], which of the two is read; the other one is written.
        is_token: int32 [B], 0 where a row has padding.
    """
    (B, _, many, D), device = heads.shape, heads.device
    H = many - 2 * kv_heads
    overlap = dependent(device)
    inner = _project(hidden_states[:, 0], parts.inputs)
    gate = _project(inner[:, -D:], parts.gate_out)
    channels = None
    if parts.decay_out is not None:
        channels = _project(inner[:, kv_heads : kv_heads + D], parts.decay_out)
    beta = torch.empty((B, 1, kv_heads), dtype=torch.float32, device=device)
    log_decay = beta.new_empty((B, 1, kv_heads) if channels is None else (B, 1, kv_heads, D))
    launch(_gating_kernel, (kv_heads, B))(
        inner, channels, parts.log_rate, parts.decay_bias, beta, log_decay, is_token,
        inner.shape[1],
        D=D, **tiles("gating", D, device), **overlap,
    )  # fmt: skip
    mixed = torch.empty_like(heads)
    taps = 1 if parts.convolution is None else parts.convolution.shape[1]
    launch(_short_convolution_kernel, (many, B))(
        heads, tails, parts.convolution, mixed, turn, is_token, H + kv_heads, D=D, TAPS=taps,
        **tiles("short_convolution", D, device), **overlap,
    )  # fmt: skip
    q, k, v = mixed.split([H, kv_heads, kv_heads], dim=2)
    x = launch_decode(
        q, k, v, log_decay=log_decay, beta=beta, scale=scale, before=states, after=states,
        turn=turn,
    )  # fmt: skip
    out = torch.empty_like(x)
    launch(_gated_norm_kernel, (H, B))(
        x, gate, parts.gate_bias, parts.norm, out, D=D, **tiles("gated_norm", D, device), **overlap
    )
    return out


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Map x [B K] to [B N] in its dtype by weight [N K]."""
    (B, K), N = x.shape, weight.shape[0]
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    config = tiles("project_row", K, x.device)
    launch(_project_row_kernel, (cdiv(N, config["BLOCK_N"]), B))(
        x, weight, y, x.stride(0), N, K, **config, **dependent(x.device)
    )
    return y
