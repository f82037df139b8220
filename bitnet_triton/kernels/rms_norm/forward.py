"""Triton forward of RMSNorm, and of what stands between the products of ternary models.

One program takes one row. Values are rounded to the dtype of the activations wherever transformers
rounds them, so that the codes of the fused kernels are those of the steps taken one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.common.tiles import store_quantized_row
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _normalised(x, weight, D, eps, dtype: tl.constexpr) -> tl.tensor:
    """Normalise x [BLOCK_D], 0 from D on, round it to its dtype, and scale it to ``dtype``."""
    wide = x.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(wide * wide, axis=0), D * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    narrow = (wide * rstd).to(x.dtype)
    return (narrow.to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rms_norm_fwd_kernel(
    # tensors: x, y [M, D]; weight [D]
    x_ptr, weight_ptr, y_ptr,
    # strides, in elements
    x_stride_m,
    # sizes and scalars
    D, eps,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < D

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0)  # [BLOCK_D]
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0)
    y = _normalised(x, weight, D, eps, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + cols, y, mask=in_row)


@triton.jit
def _rms_norm_quantize_fwd_kernel(
    # tensors: x, codes [M, D]; weight [D]; scale [M]; sums [M] int32
    x_ptr, weight_ptr, codes_ptr, scale_ptr, sums_ptr,
    # strides, in elements
    x_stride_m,
    # sizes and scalars
    D, eps,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < D

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0)  # [BLOCK_D]
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0)
    y = _normalised(x, weight, D, eps, x.dtype).to(tl.float32)
    store_quantized_row(y, codes_ptr, scale_ptr, sums_ptr, row, D, cols, True)


@triton.jit
def _relu2_mul_norm_quantize_fwd_kernel(
    # tensors: gate_up [M, 2 F]; weight [F]; codes [M, F]; scale [M]; sums [M] int32
    gate_up_ptr, weight_ptr, codes_ptr, scale_ptr, sums_ptr,
    # strides, in elements
    gate_up_stride_m,
    # sizes and scalars
    F, eps,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_F)
    in_row = cols < F

    gate_ptrs = gate_up_ptr + row * gate_up_stride_m + cols
    gate = tl.load(gate_ptrs, mask=in_row, other=0.0)  # [BLOCK_F]
    up = tl.load(gate_ptrs + F, mask=in_row, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0)
    # not tl.maximum: NaN has to stay
    wide = gate.to(tl.float32)
    wide = tl.where(wide < 0, 0.0, wide)
    squared = (wide * wide).to(gate.dtype)
    product = (squared.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    y = _normalised(product, weight, F, eps, product.dtype).to(tl.float32)
    store_quantized_row(y, codes_ptr, scale_ptr, sums_ptr, row, F, cols, True)


@triton.jit
def _silu_mul_quantize_fwd_kernel(
    # tensors: gate_up [M, 2 F]; codes [M, F]; scale [M]; sums [M] int32
    gate_up_ptr, codes_ptr, scale_ptr, sums_ptr,
    # strides, in elements
    gate_up_stride_m,
    # sizes
    F,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_F)
    in_row = cols < F

    gate_ptrs = gate_up_ptr + row * gate_up_stride_m + cols
    gate = tl.load(gate_ptrs, mask=in_row, other=0.0)  # [BLOCK_F]
    up = tl.load(gate_ptrs + F, mask=in_row, other=0.0)
    wide = gate.to(tl.float32)
    silu = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(gate.dtype)
    product = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype).to(tl.float32)
    store_quantized_row(product, codes_ptr, scale_ptr, sums_ptr, row, F, cols, True)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Map x [M, D] to y [M, D] in the wider dtype of x and weight."""
    M, D = x.shape
    y = torch.empty((M, D), dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    launch(_rms_norm_fwd_kernel, (M,))(
        x, weight, y,
        x.stride(0),
        D, eps,
        **tiles("rms_norm_fwd", D, x.device), **dependent(x.device),
    )  # fmt: skip
    return y


def launch_rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x [M, D] to int8 codes [M, D], float32 scale [M, 1] and int32 sums of codes [M]."""
    M, D = x.shape
    codes, scale, sums = _empty_quantized(x, D)
    launch(_rms_norm_quantize_fwd_kernel, (M,))(
        x, weight, codes, scale, sums,
        x.stride(0),
        D, eps,
        **tiles("rms_norm_quantize_fwd", D, x.device), **dependent(x.device),
        # a fused multiply-add would skip a rounding
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, sums


def launch_relu2_mul_norm_quantize(
    gate_up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Map gate_up [M, 2 F] to int8 codes [M, F], float32 scale [M, 1] and int32 sums [M]."""
    M, F = gate_up.shape[0], weight.shape[0]
    codes, scale, sums = _empty_quantized(gate_up, F)
    launch(_relu2_mul_norm_quantize_fwd_kernel, (M,))(
        gate_up, weight, codes, scale, sums,
        gate_up.stride(0),
        F, eps,
        **tiles("relu2_mul_norm_quantize_fwd", F, gate_up.device), **dependent(gate_up.device),
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, sums


def launch_silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map gate_up [M, 2 F] to int8 codes [M, F], float32 scale [M, 1] and int32 sums [M]."""
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scale, sums = _empty_quantized(gate_up, F)
    launch(_silu_mul_quantize_fwd_kernel, (M,))(
        gate_up, codes, scale, sums,
        gate_up.stride(0),
        F,
        **tiles("silu_mul_quantize_fwd", F, gate_up.device), **dependent(gate_up.device),
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, sums


def _empty_quantized(x: Tensor, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised codes [M, D], scale [M, 1] and sums [M] for the rows of ``x``."""
    M, device = x.shape[0], x.device
    return (
        torch.empty((M, D), dtype=torch.int8, device=device),
        torch.empty((M, 1), dtype=torch.float32, device=device),
        torch.empty((M,), dtype=torch.int32, device=device),
    )
