"""Triton quantisation of activations. One program quantises one row in a single pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.tiles import store_quantized_row
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _quantize_activations_fwd_kernel(
    # tensors: x, codes [M, K]; scale [M]; sums [M] int32
    x_ptr, codes_ptr, scale_ptr, sums_ptr,
    # strides, in elements
    x_stride_m,
    # sizes
    K,
    # compile-time
    WITH_SUMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    in_row = cols < K

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_K]
    store_quantized_row(x, codes_ptr, scale_ptr, sums_ptr, row, K, cols, WITH_SUMS)


def launch_quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x [M, K] to int8 codes [M, K] and float32 scale [M, 1]."""
    codes, scale = _outputs(x)
    _launch(x, codes, scale, None)
    return codes, scale


def launch_quantize_with_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map x [M, K] to int8 codes [M, K], float32 scale [M, 1] and int32 sums of codes [M]."""
    codes, scale = _outputs(x)
    sums = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    _launch(x, codes, scale, sums)
    return codes, scale, sums


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)


def _launch(x: Tensor, codes: Tensor, scale: Tensor, sums: Tensor | None) -> None:
    M, K = x.shape
    launch(_quantize_activations_fwd_kernel, (M,))(
        x, codes, scale, scale if sums is None else sums,
        x.stride(0),
        K,
        WITH_SUMS=sums is not None,
        **tiles("quantize_activations_fwd", K, x.device),
        # a fused multiply-add would skip the rounding of 127 x / gamma before the one to integers
        enable_fp_fusion=False,
    )  # fmt: skip
