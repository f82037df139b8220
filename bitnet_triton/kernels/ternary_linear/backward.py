"""Triton backward of the ternary linear: dx through packed or master weights, and dweight.

Straight-through (arXiv:2310.11453, section 2): dx = dy (beta w), dweight = dy^T (a gamma / 127).
Weights are made in registers and stand on the left, as in the forward; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.tiles import weight_codes
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _ternary_linear_bwd_kernel(
    # tensors: dy [M, 4 R]; packed [R, K]; scale [1]; dx [M, K]
    dy_ptr, packed_ptr, scale_ptr, dx_ptr,
    # sizes
    M, R, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: token * N overflows int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_token = tokens < M
    in_k = ks < K
    dtype = dy_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for r in range(0, R, BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        is_row = rows < R
        packed = tl.load(
            packed_ptr + rows[None, :] * K + ks[:, None],
            mask=is_row[None, :] & in_k[:, None], other=0,
        )  # [BLOCK_K, BLOCK_R]  # fmt: skip
        dy_ptrs = dy_ptr + tokens[None, :] * (4 * R) + rows[:, None]
        in_dy = is_row[:, None] & is_token[None, :]
        for j in tl.static_range(4):
            dy = tl.load(dy_ptrs + j * R, mask=in_dy, other=0.0)  # [BLOCK_R, BLOCK_M]
            codes = (((packed >> (2 * j)) & 3).to(tl.int8) - 1).to(dtype)
            acc = tl.dot(codes, dy, acc, input_precision="ieee")  # [BLOCK_K, BLOCK_M]

    dx = acc * tl.load(scale_ptr)
    out = dx_ptr + tokens[None, :] * K + ks[:, None]
    tl.store(out, dx.to(dtype), mask=in_k[:, None] & is_token[None, :])


@triton.jit
def _bit_linear_bwd_dx_kernel(
    # tensors: dy [M, N]; weight [N, K]; stats [2]; dx [M, K]
    dy_ptr, weight_ptr, stats_ptr, dx_ptr,
    # sizes
    M, N, K,
    # compile-time
    BINARY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: token * N overflows int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_token = tokens < M
    in_k = ks < K
    dtype = dy_ptr.dtype.element_ty
    scale = tl.load(stats_ptr)
    mean = tl.load(stats_ptr + 1)

    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for n in range(0, N, BLOCK_N):
        rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = rows < N
        weight = tl.load(
            weight_ptr + rows[None, :] * K + ks[:, None],
            mask=is_row[None, :] & in_k[:, None], other=0.0,
        )  # [BLOCK_K, BLOCK_N]  # fmt: skip
        # beyond N dy is 0, so any code will do there
        dy = tl.load(
            dy_ptr + tokens[None, :] * N + rows[:, None],
            mask=is_row[:, None] & is_token[None, :], other=0.0,
        )  # [BLOCK_N, BLOCK_M]  # fmt: skip
        codes = weight_codes(weight, scale, mean, BINARY).to(dtype)
        acc = tl.dot(codes, dy, acc, input_precision="ieee")  # [BLOCK_K, BLOCK_M]

    dx = acc * scale
    out = dx_ptr + tokens[None, :] * K + ks[:, None]
    tl.store(out, dx.to(dtype), mask=in_k[:, None] & is_token[None, :])


@triton.jit
def _bit_linear_bwd_dweight_kernel(
    # tensors: dy [M, N]; a [M, K] int8; a_scale [M]; dweight [N, K]
    dy_ptr, a_ptr, a_scale_ptr, dweight_ptr,
    # sizes
    M, N, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 elements on
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row = rows < N
    in_k = ks < K
    dtype = dy_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, M, BLOCK_M):
        tokens = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        is_token = tokens < M
        dy = tl.load(
            dy_ptr + tokens[None, :] * N + rows[:, None],
            mask=is_token[None, :] & is_row[:, None], other=0.0,
        )  # [BLOCK_N, BLOCK_M]  # fmt: skip
        token_scale = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0)
        a = tl.load(
            a_ptr + tokens[:, None] * K + ks[None, :],
            mask=is_token[:, None] & in_k[None, :], other=0,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        # scaled, a is about x and has its range; dy times the scale would underflow in float16
        x = (a.to(tl.float32) * token_scale[:, None]).to(dtype)
        acc = tl.dot(dy, x, acc, input_precision="ieee")  # [BLOCK_N, BLOCK_K]

    out = dweight_ptr + rows[:, None] * K + ks[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=is_row[:, None] & in_k[None, :])


def launch_ternary_linear_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Map dy [M, N] to dx [M, K] in its dtype."""
    M, (R, K) = dy.shape[0], packed.shape
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    config = tiles("ternary_linear_bwd", M, dy.device)
    grid = (triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(M, config["BLOCK_M"]))
    launch(_ternary_linear_bwd_kernel, grid)(dy, packed, scale, dx, M, R, K, **config)
    return dx


def launch_bit_linear_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    """Map dy [M, N] and master weight [N, K] to dx [M, K] in the dtype of dy."""
    M, (N, K) = dy.shape[0], weight.shape
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    config = tiles("bit_linear_bwd_dx", M, dy.device)
    grid = (triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(M, config["BLOCK_M"]))
    launch(_bit_linear_bwd_dx_kernel, grid)(dy, weight, stats, dx, M, N, K, BINARY=binary, **config)
    return dx


def launch_bit_linear_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Map dy [M, N], codes a [M, K] and a_scale [M, 1] to dweight [N, K] in ``dtype``."""
    (M, N), K = dy.shape, a.shape[1]
    dweight = torch.empty((N, K), dtype=dtype, device=dy.device)
    config = tiles("bit_linear_bwd_dweight", M, dy.device)
    grid = (triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(K, config["BLOCK_K"]))
    launch(_bit_linear_bwd_dweight_kernel, grid)(dy, a, a_scale, dweight, M, N, K, **config)
    return dweight
