"""Triton index queries and keys of one decode step: projected, normed, rotated, stored.

One program makes one index head of one row, the last one the key, which goes into the cache. Slots
and positions are read from memory, so that a launch recorded once serves every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.common.tiles import round_half_even
from bitnet_triton.kernels.rotary.forward import load_halves
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _project(
    x_ptr, weight_ptr, K, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Return the products of HALF rows of a weight with x [K], [PADDED_HALF] in the dtype of x."""
    rows = tl.arange(0, PADDED_HALF)
    total = tl.zeros((PADDED_HALF,), tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        is_weight = (rows < HALF)[:, None] & (cols < K)[None, :]
        at = weight_ptr + rows[:, None] * K + cols[None, :]
        weight = tl.load(at, mask=is_weight, other=0.0)  # [PADDED_HALF, BLOCK_K]
        total += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
    return total.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _rounded(straight, crossed, dtype: tl.constexpr) -> tl.tensor:
    """Add two products in a dtype, each rounded to it first, as the rotary embedding does."""
    return (straight.to(dtype).to(tl.float32) + crossed.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _block_index_step_kernel(
    # tensors: x [B K]; q_weight [Hk D K]; k_weight [D K]; q_norm, k_norm [D]; cos, sin [P D];
    # q [B Hk D]; keys [B C 1 D]; scale float32 [B C 1] or None
    x_ptr, q_weight_ptr, k_weight_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    q_ptr, keys_ptr, scale_ptr,
    # int32 [B]: where the new token lies, and where it stands
    slots_ptr, positions_ptr,
    # strides, in elements
    x_stride_b, keys_stride_b, keys_stride_c, scale_stride_b,
    # sizes and scalars
    K, P, capacity, eps,
    # compile-time
    DEPENDENT: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1) - 1
    is_key = head == heads
    D: tl.constexpr = 2 * HALF
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += b * x_stride_b
    norm_ptr = tl.where(is_key, k_norm_ptr, q_norm_ptr)
    weight_ptr = tl.where(is_key, k_weight_ptr, q_weight_ptr + head.to(tl.int64) * D * K)
    y1 = _project(x_ptr, weight_ptr, K, HALF, PADDED_HALF, BLOCK_K)
    y2 = _project(x_ptr, weight_ptr + HALF * K, K, HALF, PADDED_HALF, BLOCK_K)

    cols = tl.arange(0, PADDED_HALF)
    is_col = cols < HALF
    rstd = tl.rsqrt((tl.sum(y1 * y1, axis=0) + tl.sum(y2 * y2, axis=0)) / D + eps)
    norm1 = tl.load(norm_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    norm2 = tl.load(norm_ptr + HALF + cols, mask=is_col, other=0.0).to(tl.float32)
    y1 = (y1 * rstd * norm1).to(dtype).to(tl.float32)
    y2 = (y2 * rstd * norm2).to(dtype).to(tl.float32)

    # padding on the left stands before position 0
    position = tl.maximum(tl.load(positions_ptr + b), 0).to(tl.int64)
    cos1, cos2 = load_halves(cos_ptr + position * D, position < P, HALF, PADDED_HALF)
    sin1, sin2 = load_halves(sin_ptr + position * D, position < P, HALF, PADDED_HALF)
    z1 = tl.where(is_col, _rounded(y1 * cos1, -y2 * sin1, dtype), 0.0)
    z2 = tl.where(is_col, _rounded(y2 * cos2, y1 * sin2, dtype), 0.0)
    if head < heads:
        q_ptr += (b * heads + head) * D
        tl.store(q_ptr + cols, z1, mask=is_col)
        tl.store(q_ptr + HALF + cols, z2, mask=is_col)
    else:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        is_slot = (slot >= 0) & (slot < capacity)
        keys_ptr += b * keys_stride_b + slot * keys_stride_c
        key1 = z1.to(tl.float32)
        key2 = z2.to(tl.float32)
        if scale_ptr is not None:
            largest = tl.maximum(tl.max(tl.abs(key1), axis=0), tl.max(tl.abs(key2), axis=0))
            scale = tl.div_rn(tl.maximum(largest, 1e-12), 127.0)
            tl.store(scale_ptr + b * scale_stride_b + slot, scale, mask=is_slot)
            key1 = round_half_even(tl.div_rn(key1, scale))
            key2 = round_half_even(tl.div_rn(key2, scale))
        stored: tl.constexpr = keys_ptr.dtype.element_ty
        tl.store(keys_ptr + cols, key1.to(stored), mask=is_col & is_slot)
        tl.store(keys_ptr + HALF + cols, key2.to(stored), mask=is_col & is_slot)


def launch_block_index_step(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, q_norm: Tensor, k_norm: Tensor,
    cos: Tensor, sin: Tensor, keys: Tensor, scale: Tensor | None, slots: Tensor, positions: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """Store the index key of a token and return its index queries [B 1 Hk D], by one launch.

    Args:
        x: [B K], the hidden states that enter the layer.
        q_weight: [Hk * D, K].
        k_weight: [D K].
        q_norm: [D], weights of the norm of each query.
        k_norm: [D].
        cos: [P D], all positions.
        sin: likewise.
        keys: [B C 1 D], changed in place; int8 with ``scale``.
        scale: float32 [B C 1], changed in place, or None.
        slots: int32 [B].
        positions: int32 [B].
        eps: of the norms.
    """
    (B, K), D = x.shape, k_weight.shape[0]
    heads = q_weight.shape[0] // D
    q = torch.empty((B, 1, heads, D), dtype=x.dtype, device=x.device)
    launch(_block_index_step_kernel, (B, heads + 1))(
        x, q_weight, k_weight, q_norm, k_norm, cos, sin, q, keys, scale, slots, positions,
        x.stride(0), keys.stride(0), keys.stride(1), 0 if scale is None else scale.stride(0),
        K, cos.shape[0], keys.shape[1], eps,
        HALF=D // 2, PADDED_HALF=triton.next_power_of_2(D // 2),
        **tiles("block_index_step", D, x.device), **dependent(x.device),
        # a fused multiply-add would skip the rounding of a product
        enable_fp_fusion=False,
    )  # fmt: skip
    return q
