"""Triton kernels of one decode step beside attention: compress a block that is whole, and gates.

Lengths are read from memory and grids depend on shapes alone, so that launches recorded once serve
every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _sum_tokens(
    x_ptr, stride, weights_ptr, r, D0, DH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
) -> tuple:  # fmt: skip
    """Load a half of the tokens of a block, [BLOCK_R, DH] from D0 on, and their weights."""
    x = load_rows(x_ptr + D0, r, stride, r < BLOCK, DH, BLOCK_H).to(tl.float32)
    if weights_ptr is None:
        weights = tl.where(r < BLOCK, 1.0 / BLOCK, 0.0)
    else:
        weights = tl.load(weights_ptr + r, mask=r < BLOCK, other=0.0).to(tl.float32)
    return x, weights


@triton.jit
def _sum_places(
    places_ptr, stride, weights, r, D0, DH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return what embeddings of places add to DH entries of each sum, from D0 on, [BLOCK_H]."""
    x = load_rows(places_ptr + D0, r, stride, r < BLOCK, DH, BLOCK_H).to(tl.float32)
    return tl.sum(x * weights[:, None], axis=0)


@triton.jit
def _compress_step_kernel(
    # tensors: keys [B C Hk D], values [B C Hk DV]; k, v [B N Hk D], which get a block; weights
    # [Hk BLOCK] or None: the mean; places [Hk BLOCK D] or None; cos, sin [P D]; positions int32
    # [B C], which get that of the newest token
    keys_ptr, values_ptr, k_ptr, v_ptr, k_weights_ptr, v_weights_ptr, k_places_ptr, v_places_ptr,
    cos_ptr, sin_ptr, positions_ptr,
    # int32 [B]: the first token that is no padding, one past the last one, its position
    leftpad_ptr, used_ptr, position_ptr,
    # strides, in elements
    positions_stride_b,
    keys_stride_b, keys_stride_t, keys_stride_h, values_stride_b, values_stride_t, values_stride_h,
    k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Keep the position of the newest token, and compress the block that it completes, if it does.

    Keys are turned back to where they came from, summed, and turned to the block's first token. A
    rotary embedding that scales is undone as well, and then scales the sum.
    """
    wait_for_inputs(DEPENDENT)
    HALF: tl.constexpr = D // 2
    BLOCK_H: tl.constexpr = triton.next_power_of_2(HALF)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    BLOCK_R: tl.constexpr = triton.next_power_of_2(BLOCK)
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    left = tl.load(leftpad_ptr + batch)
    used = tl.load(used_ptr + batch)
    newest = tl.load(position_ptr + batch)
    positions_ptr += batch * positions_stride_b
    # one program writes, and none reads it
    tl.store(positions_ptr + used - 1, newest, mask=head == 0)
    n = (used - left - BLOCK) // STRIDE
    if (used - left < BLOCK) | (n * STRIDE != used - left - BLOCK):
        return
    r = tl.arange(0, BLOCK_R)
    first = (used - BLOCK).to(tl.int64)
    at = keys_ptr + batch * keys_stride_b + first * keys_stride_t + head * keys_stride_h
    k_weights_at = k_weights_ptr
    v_weights_at = v_weights_ptr
    if k_weights_ptr is not None:
        k_weights_at = k_weights_ptr + head * BLOCK
    if v_weights_ptr is not None:
        v_weights_at = v_weights_ptr + head * BLOCK
    a, weights = _sum_tokens(at, keys_stride_t, k_weights_at, r, 0, HALF, BLOCK, BLOCK_R, BLOCK_H)
    b, _ = _sum_tokens(at, keys_stride_t, k_weights_at, r, HALF, HALF, BLOCK, BLOCK_R, BLOCK_H)
    place = tl.load(positions_ptr + first + r, mask=r < BLOCK - 1, other=0)
    place = tl.where(r == BLOCK - 1, newest, place)
    cos = load_rows(cos_ptr, place, D, r < BLOCK, HALF, BLOCK_H).to(tl.float32)
    sin = load_rows(sin_ptr, place, D, r < BLOCK, HALF, BLOCK_H).to(tl.float32)
    size = cos * cos + sin * sin
    share = weights[:, None] / tl.where(size > 0, size, 1.0)
    low = tl.sum((a * cos + b * sin) * share, axis=0)  # [BLOCK_H]
    high = tl.sum((b * cos - a * sin) * share, axis=0)
    dims = tl.arange(0, BLOCK_H)
    in_half = dims < HALF
    if k_places_ptr is not None:
        places = k_places_ptr + head * BLOCK * D
        low += _sum_places(places, D, weights, r, 0, HALF, BLOCK, BLOCK_H)
        high += _sum_places(places, D, weights, r, HALF, HALF, BLOCK, BLOCK_H)
    turn = tl.sum(tl.where(r == 0, place, 0)).to(tl.int64) * D + dims
    cos_first = tl.load(cos_ptr + turn, mask=in_half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + turn, mask=in_half, other=0.0).to(tl.float32)
    to = k_ptr + batch * k_stride_b + n.to(tl.int64) * k_stride_n + head * k_stride_h + dims
    kind = k_ptr.dtype.element_ty
    tl.store(to, (low * cos_first - high * sin_first).to(kind), mask=in_half)
    tl.store(to + HALF, (high * cos_first + low * sin_first).to(kind), mask=in_half)

    at = values_ptr + batch * values_stride_b + first * values_stride_t + head * values_stride_h
    x, weights = _sum_tokens(at, values_stride_t, v_weights_at, r, 0, DV, BLOCK, BLOCK_R, BLOCK_DV)
    total = tl.sum(x * weights[:, None], axis=0)
    dims = tl.arange(0, BLOCK_DV)
    if v_places_ptr is not None:
        places = v_places_ptr + head * BLOCK * DV
        total += _sum_places(places, DV, weights, r, 0, DV, BLOCK, BLOCK_DV)
    to = v_ptr + batch * v_stride_b + n.to(tl.int64) * v_stride_n + head * v_stride_h + dims
    tl.store(to, total.to(v_ptr.dtype.element_ty), mask=dims < DV)


def launch_compress_step(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, *, blocks: SparseBlocks,
    weights: tuple[Tensor | None, Tensor | None], places: tuple[Tensor | None, Tensor | None],
    cos: Tensor, sin: Tensor, positions: Tensor, leftpad: Tensor, used: Tensor, position: Tensor,
) -> None:  # fmt: skip
    """Write the block that the newest token completes into k and v, by launches alone.

    Its position is written behind those of the former ones.

    Args:
        keys: [B C Hk D], rotated, and values [B C Hk Dv]: views whose last dimension is contiguous.
        values: likewise.
        k: [B N Hk D], compressed and rotated, and v [B N Hk Dv].
        v: likewise.
        blocks: sizes.
        weights: of keys and of values, [Hk block]; None: the mean.
        places: embeddings of the places in a block, of keys and of values, [Hk block D], or None.
        cos: [P D], the rotary embedding of all positions, and sin.
        sin: likewise.
        positions: int32 [B C], of each token in the rotary embedding.
        leftpad: int32 [B], the first token that is no padding.
        used: int32 [B], one past the last one.
        position: int32 [B], of the last one in the rotary embedding.
    """
    (B, _, Hk, D), DV = keys.shape, values.shape[-1]
    launch(_compress_step_kernel, (Hk, B))(
        keys, values, k, v, *weights, *places, cos, sin, positions, leftpad, used, position,
        positions.stride(0), *keys.stride()[:3], *values.stride()[:3], *k.stride()[:3],
        *v.stride()[:3],
        D=D, DV=DV, BLOCK=blocks.block, STRIDE=blocks.stride,
        **tiles("compress_step", D, keys.device), **dependent(keys.device),
    )  # fmt: skip


@triton.jit
def _sparse_gates_kernel(
    # tensors: x [B K]; weight [N K]; bias [N]; gates [B N]
    x_ptr, weight_ptr, bias_ptr, gates_ptr,
    # sizes
    N, K,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``sigmoid(weight x + bias)`` for a tile of gates of one row."""
    wait_for_inputs(DEPENDENT)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_row = start + cols < K
        x = tl.load(x_ptr + batch * K + start + cols, mask=in_row, other=0.0).to(tl.float32)
        at = weight_ptr + n[:, None] * K + (start + cols)[None, :]
        weight = tl.load(at, mask=(n < N)[:, None] & in_row[None, :], other=0.0)
        total += weight.to(tl.float32) * x[None, :]  # [BLOCK_N, BLOCK_K]
    logits = tl.sum(total, axis=1) + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    gates = tl.sigmoid(logits).to(gates_ptr.dtype.element_ty)
    tl.store(gates_ptr + batch * N + n, gates, mask=n < N)


def launch_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map x [B 1 K] to gates [B 1 N / 3 3] by weight [N K] and bias [N], by a launch alone."""
    (B, _, K), N = x.shape, weight.shape[0]
    gates = torch.empty((B, 1, N // 3, 3), dtype=x.dtype, device=x.device)
    config = tiles("sparse_gates", K, x.device)
    launch(_sparse_gates_kernel, (cdiv(N, config["BLOCK_N"]), B))(
        x, weight, bias, gates, N, K, **config, **dependent(x.device)
    )
    return gates
