"""Triton rotary embedding, forward and backward. One program rotates the heads of one token.

Products are rounded to the dtype of the heads before they are added, as in transformers: results
are equal to its results, bit by bit. A rotation's derivative is the rotation back: one kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def load_halves(row_ptr, is_known, HALF: tl.constexpr, PADDED_HALF: tl.constexpr) -> tuple:
    """Load both halves of cosines or sines [2 HALF] as float32; NaN if they are not known."""
    cols = tl.arange(0, PADDED_HALF)
    wanted = (cols < HALF) & is_known
    first = tl.load(row_ptr + cols, mask=wanted, other=float("nan"))  # [PADDED_HALF]
    second = tl.load(row_ptr + HALF + cols, mask=wanted, other=float("nan"))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def rotate_heads(
    # the first of ``heads`` rows [2 HALF] to read and to write, and the steps between them
    x_ptr, x_stride_h, y_ptr, y_stride_h, heads, is_stored,
    # y1 = x1 cos1 + x2 sin1, y2 = x2 cos2 + x1 sin2: [PADDED_HALF] each
    cos1, cos2, sin1, sin2,
    # compile-time
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate the heads of one token, BLOCK_H at a time."""
    cols = tl.arange(0, PADDED_HALF)[None, :]
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
        is_head = (h < heads) & (cols < HALF)  # [BLOCK_H, PADDED_HALF], as all below
        x1 = tl.load(x_ptr + h * x_stride_h + cols, mask=is_head, other=0.0)
        x2 = tl.load(x_ptr + h * x_stride_h + HALF + cols, mask=is_head, other=0.0)
        y1 = _rounded_sum(x1, cos1[None, :], x2, sin1[None, :])
        y2 = _rounded_sum(x2, cos2[None, :], x1, sin2[None, :])
        tl.store(y_ptr + h * y_stride_h + cols, y1, mask=is_head & is_stored)
        tl.store(y_ptr + h * y_stride_h + HALF + cols, y2, mask=is_head & is_stored)


@triton.jit
def _rounded_sum(a, cos, b, sin) -> tl.tensor:
    """Compute ``a cos + b sin``, rounded to the dtype of ``a`` after each operation."""
    straight = (a.to(tl.float32) * cos).to(a.dtype)
    crossed = (b.to(tl.float32) * sin).to(a.dtype)
    return (straight.to(tl.float32) + crossed.to(tl.float32)).to(a.dtype)


@triton.jit
def _rotary_kernel(
    # tensors: x [B, T, H, D], any strides but the last; cos, sin [B or 1, T, D]; y [B, T, H, D]
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    # strides, in elements
    x_stride_b, x_stride_t, x_stride_h, cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t,
    # sizes
    T, H,
    # compile-time
    BACKWARD: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # int64: offsets overflow int32 from 2**31 elements on
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    cos_row = cos_ptr + b * cos_stride_b + t * cos_stride_t
    sin_row = sin_ptr + b * sin_stride_b + t * sin_stride_t
    cos1, cos2 = load_halves(cos_row, True, HALF, PADDED_HALF)
    sin1, sin2 = load_halves(sin_row, True, HALF, PADDED_HALF)
    if BACKWARD:
        across1, across2 = sin2, -sin1
    else:
        across1, across2 = -sin1, sin2
    rotate_heads(
        x_ptr + b * x_stride_b + t * x_stride_t, x_stride_h,
        y_ptr + token * H * 2 * HALF, 2 * HALF, H, True,
        cos1, cos2, across1, across2, HALF, PADDED_HALF, BLOCK_H,
    )  # fmt: skip


def launch_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Map x [B, T, H, D] and cos, sin [B or 1, T, D] to [B, T, H, D] in its dtype."""
    B, T, H, D = x.shape
    y = torch.empty((B, T, H, D), dtype=x.dtype, device=x.device)
    launch(_rotary_kernel, (B * T,))(
        x, cos, sin, y,
        *x.stride()[:3], *batch_strides(cos), *batch_strides(sin),
        T, H,
        BACKWARD=backward, HALF=D // 2, PADDED_HALF=triton.next_power_of_2(D // 2),
        **tiles("rotary", D, x.device),
        # a fused multiply-add would skip the rounding of a product
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


def batch_strides(rows: Tensor) -> tuple[int, int]:
    """Return how far cosines or sines [B or 1, T, D] of rows and tokens lie apart."""
    return (0 if rows.shape[0] == 1 else rows.stride(0)), rows.stride(1)
