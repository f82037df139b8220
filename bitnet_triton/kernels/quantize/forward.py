"""Triton quantisers: one program quantises one row of activations in a single pass.

The statistics of a weight take two kernels, so that their sums come in the same order every time:
the programs of the first sum some blocks each, the only program of the second adds these sums up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.common.tiles import store_quantized_row
from bitnet_triton.runtime import cdiv, launch
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
    DEPENDENT: tl.constexpr, WITH_SUMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    in_row = cols < K

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_K]
    store_quantized_row(x, codes_ptr, scale_ptr, sums_ptr, row, K, cols, WITH_SUMS)


@triton.jit
def _weight_sums_fwd_kernel(
    # tensors: weight [SIZE]; sums [2, programs], of magnitudes and of values
    weight_ptr, sums_ptr,
    # sizes
    SIZE,
    # compile-time
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # int64: a weight may have more than 2**31 elements
    first = program.to(tl.int64) * (BLOCK * BLOCKS)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)  # [BLOCK]
        magnitudes += tl.abs(w)
        values += w
    tl.store(sums_ptr + program, tl.sum(magnitudes, axis=0))
    tl.store(sums_ptr + tl.num_programs(0) + program, tl.sum(values, axis=0))


@triton.jit
def _weight_stats_fwd_kernel(
    # tensors: sums [2, SUMS]; stats [2]
    sums_ptr, stats_ptr,
    # sizes
    SUMS, SIZE,
    # compile-time
    BLOCK: tl.constexpr,
):  # fmt: skip
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SUMS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        magnitudes += tl.load(sums_ptr + at, mask=at < SUMS, other=0.0)  # [BLOCK]
        values += tl.load(sums_ptr + SUMS + at, mask=at < SUMS, other=0.0)
    scale = tl.sum(magnitudes, axis=0) / SIZE
    # a comparison, not a maximum: that would drop NaN
    tl.store(stats_ptr, tl.where(scale < 1e-5, 1e-5, scale))
    tl.store(stats_ptr + 1, tl.sum(values, axis=0) / SIZE)


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
        **tiles("quantize_activations_fwd", K, x.device), **dependent(x.device),
        # a fused multiply-add would skip the rounding of 127 x / gamma before the one to integers
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_weight_stats(weight: Tensor) -> Tensor:
    """Map weight [N, K] to float32 [2]: its scale, and the mean that binary codes compare with."""
    size, device = weight.numel(), weight.device
    config = tiles("weight_sums_fwd", size, device)
    programs = cdiv(size, config["BLOCK"] * config["BLOCKS"])
    sums = torch.empty((2, programs), dtype=torch.float32, device=device)
    stats = torch.empty(2, dtype=torch.float32, device=device)
    launch(_weight_sums_fwd_kernel, (programs,))(weight, sums, size, **config)
    config = tiles("weight_stats_fwd", programs, device)
    launch(_weight_stats_fwd_kernel, (1,))(sums, stats, programs, size, **config)
    return stats
