"""Triton rotary embedding on the way into the cache.

Three programs a token: one rotates its queries, one its keys, one copies its values.
Positions and slots are read from memory, so that a launch recorded once serves every decode step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.rotary.forward import batch_strides, load_halves, rotate_heads
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _copy_heads(
    x_ptr, x_stride_h, y_ptr, y_stride_h, heads, is_stored,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
        is_head = (h < heads) & (cols < D)
        x = tl.load(x_ptr + h * x_stride_h + cols, mask=is_head, other=0.0)  # [BLOCK_H, BLOCK_D]
        tl.store(y_ptr + h * y_stride_h + cols, x, mask=is_head & is_stored)


@triton.jit
def _rotary_and_store_kernel(
    # tensors: qkv [B, T, H + 2 Hk, D]; cos, sin [P, D] or [B or 1, T, D]; q [B, T, H, D];
    # k_cache, v_cache [B, capacity, Hk, D]; slots, positions [B] int32
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr,
    # strides, in elements
    qkv_stride_b, qkv_stride_t, qkv_stride_h,
    cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t,
    k_stride_b, k_stride_c, k_stride_h, v_stride_b, v_stride_c, v_stride_h,
    # sizes; of the table of cosines and sines P
    T, H, Hk, capacity, P,
    # compile-time
    DEPENDENT: tl.constexpr, IS_TABLE: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: offsets overflow int32 from 2**31 elements on
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = token // T
    t = token % T
    row = t
    is_known = True
    if IS_TABLE:
        # padding on the left stands before position 0
        row = tl.maximum(tl.load(positions_ptr + b) + t, 0)
        is_known = row < P
    slot = tl.load(slots_ptr + b) + t
    is_slot = (slot >= 0) & (slot < capacity)
    x_ptr = qkv_ptr + b * qkv_stride_b + t * qkv_stride_t

    if part == 2:
        _copy_heads(
            x_ptr + tl.cast(H + Hk, tl.int64) * qkv_stride_h, qkv_stride_h,
            v_ptr + b * v_stride_b + slot * v_stride_c, v_stride_h, Hk, is_slot,
            2 * HALF, 2 * PADDED_HALF, BLOCK_H,
        )  # fmt: skip
    else:
        cos_row = cos_ptr + b * cos_stride_b + row * cos_stride_t
        sin_row = sin_ptr + b * sin_stride_b + row * sin_stride_t
        cos1, cos2 = load_halves(cos_row, is_known, HALF, PADDED_HALF)
        sin1, sin2 = load_halves(sin_row, is_known, HALF, PADDED_HALF)
        if part == 0:
            rotate_heads(
                x_ptr, qkv_stride_h, q_ptr + token * H * 2 * HALF, 2 * HALF, H, True,
                cos1, cos2, -sin1, sin2, HALF, PADDED_HALF, BLOCK_H,
            )  # fmt: skip
        else:
            rotate_heads(
                x_ptr + tl.cast(H, tl.int64) * qkv_stride_h, qkv_stride_h,
                k_ptr + b * k_stride_b + slot * k_stride_c, k_stride_h, Hk, is_slot,
                cos1, cos2, -sin1, sin2, HALF, PADDED_HALF, BLOCK_H,
            )  # fmt: skip


def launch_rotary_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """Store the keys and values of qkv [B, T, H + 2 Hk, D]; return the queries [B, T, H, D].

    With ``positions`` [B], cos and sin are tables [P, D], without it they are [B or 1, T, D].
    """
    B, T, heads, D = qkv.shape
    capacity, Hk = k_cache.shape[1:3]
    H = heads - 2 * Hk
    is_table = positions is not None
    # a table serves every row, as angles with a batch of 1 do
    rows = [a.unsqueeze(0) if is_table else a for a in (cos, sin)]
    q = torch.empty((B, T, H, D), dtype=qkv.dtype, device=qkv.device)
    launch(_rotary_and_store_kernel, (B * T, 3))(
        qkv, cos, sin, q, k_cache, v_cache, slots, positions if is_table else slots,
        *qkv.stride()[:3],
        *batch_strides(rows[0]), *batch_strides(rows[1]),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        T, H, Hk, capacity, cos.shape[0],
        IS_TABLE=is_table, HALF=D // 2, PADDED_HALF=triton.next_power_of_2(D // 2),
        **tiles("rotary_and_store", D, qkv.device), **dependent(qkv.device),
        # a fused multiply-add would skip the rounding of a product
        enable_fp_fusion=False,
    )  # fmt: skip
    return q
