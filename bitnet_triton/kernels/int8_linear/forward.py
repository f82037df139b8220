"""Triton product of int8 weights with activations of 15 bits, held as two int8 planes.

Splitting: one program takes one token. The product: one program reads BLOCK_N rows of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.best.forward import launch_merge_best, store_best
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.common.tiles import round_half_even
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _split_activations_fwd_kernel(
    # tensors: x [M, K]; planes [M, 2, K] int8; scale [M]
    x_ptr, planes_ptr, scale_ptr,
    # strides, in elements
    x_stride_m,
    # sizes
    K,
    # compile-time
    DEPENDENT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    in_row = cols < K

    x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_K]
    # bit patterns of magnitudes order like the magnitudes, with NaN on top: tl.max drops NaN
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0)
    largest = bits.to(tl.float32, bitcast=True)
    # x is at most 16319 steps: 127 * 128 + 63, which two planes of 7 bits and a sign hold
    step = tl.div_rn(tl.where(largest < 1e-30, 1e-30, largest), 16319.0)
    code = round_half_even(tl.div_rn(x, step))
    high = round_half_even(code * 0.0078125)
    tl.store(planes_ptr + row * 2 * K + cols, high.to(tl.int8), mask=in_row)
    tl.store(planes_ptr + row * 2 * K + K + cols, (code - 128 * high).to(tl.int8), mask=in_row)
    tl.store(scale_ptr + row, step)


@triton.jit
def _int8_product(
    # tensors: planes [M, 2, K], codes [N, K] int8; x_scale [M]; scale, bias [N]
    planes_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr,
    # which tokens [BLOCK_M] and rows [BLOCK_N] are multiplied
    first_token, rows,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ks = tl.arange(0, BLOCK_K)
    # both planes of a token are vectors of one product: the weight is read once. It stands on the
    # left, which is multiplied as it lies in memory; a CPU rearranges what stands on the right
    vectors = 2 * first_token + tl.arange(0, 2 * BLOCK_M)
    is_vector = vectors < 2 * M
    is_row = rows < N

    acc = tl.zeros((BLOCK_N, 2 * BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        codes = tl.load(
            codes_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0,
        )  # [BLOCK_N, BLOCK_K]  # fmt: skip
        planes = tl.load(
            planes_ptr + vectors[:, None] * K + (k + ks)[None, :],
            mask=is_vector[:, None] & in_k[None, :], other=0,
        )  # [2 BLOCK_M, BLOCK_K]  # fmt: skip
        acc = tl.dot(codes, tl.trans(planes), acc, out_dtype=tl.int32)  # [BLOCK_N, 2 BLOCK_M]

    tokens = first_token + tl.arange(0, BLOCK_M)
    weight_of_plane = tl.where(tl.arange(0, 2) == 0, 128.0, 1.0)[None, None, :]
    sums = tl.reshape(acc.to(tl.float32), (BLOCK_N, BLOCK_M, 2)) * weight_of_plane
    x_scale = tl.load(x_scale_ptr + tokens, mask=tokens < M, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=is_row, other=0.0)
    y = tl.trans(tl.sum(sums, axis=2)) * (x_scale[:, None] * scale[None, :])  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _int8_linear_fwd_kernel(
    # tensors: planes [M, 2, K], codes [N, K] int8; x_scale [M]; scale, bias [N]; y [M, N]
    planes_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr,
    # sizes
    M, N, K,
    # compile-time
    DEPENDENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * K overflows int32 from 2**31 elements on. Programs that share rows come together
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _int8_product(
        planes_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, first_token, rows, M, N, K,
        HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tokens = first_token + tl.arange(0, BLOCK_M)
    out = y_ptr + tokens[:, None] * N + rows[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


@triton.jit
def _int8_linear_topk_fwd_kernel(
    # tensors: planes [M, 2, K], codes [N, K] int8; x_scale [M]; scale, bias [N];
    # best [M, blocks of rows, BEST] int64; of ``like_ptr`` only the dtype counts
    planes_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, best_ptr, like_ptr,
    # sizes
    M, N, K,
    # compile-time
    DEPENDENT: tl.constexpr, HAS_BIAS: tl.constexpr, BEST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: row * K overflows int32 from 2**31 elements on. Programs that share rows come together
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _int8_product(
        planes_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, first_token, rows, M, N, K,
        HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tokens = first_token + tl.arange(0, BLOCK_M)
    best_ptrs = best_ptr + (tokens * tl.num_programs(1) + tl.program_id(1)) * BEST
    # what int8_linear would store decides, so that both agree
    store_best(y.to(like_ptr.dtype.element_ty), rows, N, best_ptrs, tokens < M, BEST)


def launch_split_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x [M, K] to int8 planes [M, 2, K], 128 times the first + the second, and scale [M]."""
    M, K = x.shape
    planes = torch.empty((M, 2, K), dtype=torch.int8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    launch(_split_activations_fwd_kernel, (M,))(
        x, planes, scale,
        x.stride(0),
        K,
        **tiles("split_activations_fwd", K, x.device), **dependent(x.device),
    )  # fmt: skip
    return planes, scale


def launch_int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Map x [M, K], codes [N, K] and scale [N] to y [M, N] in the dtype of ``x``."""
    (M, K), N = x.shape, codes.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    planes, x_scale = launch_split_activations(x)
    config = tiles("int8_linear_fwd", M, x.device)
    grid = cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
    launch(_int8_linear_fwd_kernel, grid)(
        planes, x_scale, codes, scale, scale if bias is None else bias, y,
        M, N, K,
        HAS_BIAS=bias is not None,
        **config, **dependent(x.device),
        # so that int8_linear and int8_linear_topk round alike, whatever the compiler would fuse
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


def launch_int8_linear_topk(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Map as ``launch_int8_linear`` does, but only to the k largest: values, indices [M, k]."""
    (M, K), N = x.shape, codes.shape[0]
    planes, x_scale = launch_split_activations(x)
    config = tiles("int8_linear_topk_fwd", M, x.device)
    grid = cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
    best = torch.empty((M, grid[1] * k), dtype=torch.int64, device=x.device)
    launch(_int8_linear_topk_fwd_kernel, grid)(
        planes, x_scale, codes, scale, scale if bias is None else bias, best, x,
        M, N, K,
        HAS_BIAS=bias is not None, BEST=k,
        **config, **dependent(x.device),
        # so that int8_linear and int8_linear_topk round alike, whatever the compiler would fuse
        enable_fp_fusion=False,
    )  # fmt: skip
    return launch_merge_best(best, k, x.dtype)
