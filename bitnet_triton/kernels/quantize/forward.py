"""Triton quantisation of activations. One program quantises one row in a single pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.tiles import round_half_even
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _quantize_activations_fwd_kernel(
    # tensors: x, codes [M, K]; scale [M]
    x_ptr, codes_ptr, scale_ptr,
    # strides, in elements
    x_stride_m,
    # sizes
    K,
    # compile-time
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    in_row = cols < K

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_K]
    # bit patterns of magnitudes order like the magnitudes, with NaN on top: tl.max drops NaN
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0)
    gamma = bits.to(tl.float32, bitcast=True)
    gamma = tl.where(gamma < 1e-5, 1e-5, gamma)
    # div_rn: the approximate division of GPUs moves codes at ties
    codes = round_half_even(x * tl.div_rn(127.0, gamma))
    codes = tl.minimum(tl.maximum(codes, -128.0), 127.0)

    tl.store(codes_ptr + row * K + cols, codes.to(tl.int8), mask=in_row)
    tl.store(scale_ptr + row, tl.div_rn(gamma, 127.0))


def launch_quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x [M, K] to int8 codes [M, K] and float32 scale [M, 1]."""
    M, K = x.shape
    codes = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    launch(_quantize_activations_fwd_kernel, (M,))(
        x, codes, scale,
        x.stride(0),
        K,
        **tiles("quantize_activations_fwd", K),
        # a fused multiply-add would skip the rounding of 127 x / gamma before the one to integers
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale
