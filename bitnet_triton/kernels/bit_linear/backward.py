"""Triton backward of the trainable ternary linear: dx through quantised masters, and dweight.

Straight-through (arXiv:2310.11453, section 2): dx = dy (beta w), dweight = dy^T (a gamma / 127).
Sums are float32. dx makes the codes of the weights on the way, and puts them left or right as the
forward does. dweight is computed as its transpose, x^T dy, so that the quantised activations, the
operand that is made, stand on the left and dy is read as it lies.

These two products are for CPUs. A GPU takes those of ``products.py``, which read operands that are
made once, unless its library lacks them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.bit_linear.tiles import weight_codes
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import fitted_tiles, tiles

# Rows that lie a multiple of 4096 bytes apart share one set of a cache: a line more between them
_PADDING_BYTES = 64


@triton.jit
def _bit_linear_bwd_dx_kernel(
    # tensors: dy [M, N]; weight [N, K]; stats [2]; dx [M, K]
    dy_ptr, weight_ptr, stats_ptr, dx_ptr,
    # sizes
    M, N, K,
    # compile-time
    BINARY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    # int64: token * N and row * K overflow int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_token = tokens < M
    in_k = ks < K
    dtype = dy_ptr.dtype.element_ty
    scale = tl.load(stats_ptr)
    mean = tl.load(stats_ptr + 1)

    LEFT: tl.constexpr = BLOCK_M if TOKENS_LEFT else BLOCK_K
    RIGHT: tl.constexpr = BLOCK_K if TOKENS_LEFT else BLOCK_M
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    for n in range(0, N, BLOCK_N):
        rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = rows < N
        weight = tl.load(
            weight_ptr + rows[:, None] * K + ks[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0.0,
        )  # [BLOCK_N, BLOCK_K]  # fmt: skip
        # beyond N dy is 0, so any code will do there
        dy = tl.load(
            dy_ptr + tokens[:, None] * N + rows[None, :],
            mask=is_token[:, None] & is_row[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
        codes = weight_codes(weight, scale, mean, BINARY, dtype)
        if TOKENS_LEFT:
            acc = tl.dot(dy, codes, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_K]
        else:
            acc = tl.dot(tl.trans(codes), tl.trans(dy), acc, input_precision="ieee")
    if not TOKENS_LEFT:
        acc = tl.trans(acc)

    out = dx_ptr + tokens[:, None] * K + ks[None, :]
    tl.store(out, (acc * scale).to(dtype), mask=is_token[:, None] & in_k[None, :])


@triton.jit
def _bit_linear_bwd_dweight_kernel(
    # tensors: dy [M, N]; x [M, K], int8 codes or what they stand for; x_scale [M]; dweight [N, K]
    dy_ptr, x_ptr, x_scale_ptr, dweight_ptr,
    # strides, in elements
    x_stride_m, x_stride_k,
    # sizes
    M, N, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FROM_CODES: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 elements on
    ks = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < N
    in_k = ks < K
    dtype = dy_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for m in range(0, M, BLOCK_M):
        tokens = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        is_token = tokens < M
        dy = tl.load(
            dy_ptr + tokens[:, None] * N + rows[None, :],
            mask=is_token[:, None] & is_row[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
        x = tl.load(
            x_ptr + tokens[None, :] * x_stride_m + ks[:, None] * x_stride_k,
            mask=is_token[None, :] & in_k[:, None], other=0,
        )  # [BLOCK_K, BLOCK_M]  # fmt: skip
        if FROM_CODES:
            scale = tl.load(x_scale_ptr + tokens, mask=is_token, other=0.0)
            # scaled, x has its range; dy times the scale would underflow in float16
            x = (x.to(tl.float32) * scale[None, :]).to(dtype)
        acc = tl.dot(x, dy, acc, input_precision="ieee")  # [BLOCK_K, BLOCK_N]

    out = dweight_ptr + rows[None, :] * K + ks[:, None]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=is_row[None, :] & in_k[:, None])


@triton.jit
def _bit_linear_bwd_dequantize_kernel(
    # tensors: a [M, K] int8; a_scale [M]; x [K, M]
    a_ptr, a_scale_ptr, x_ptr,
    # strides, in elements
    x_stride_k,
    # sizes
    M, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: token * K overflows int32 from 2**31 elements on
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_token = tokens < M
    in_tile = is_token[:, None] & (ks < K)[None, :]
    a = tl.load(a_ptr + tokens[:, None] * K + ks[None, :], mask=in_tile, other=0)
    scale = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0)
    x = a.to(tl.float32) * scale[:, None]  # [BLOCK_M, BLOCK_K]
    out = x_ptr + ks[None, :] * x_stride_k + tokens[:, None]
    tl.store(out, x.to(x_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _bit_linear_bwd_scale_kernel(
    # tensors: x, y [M, K]; scale [M], or one for all rows
    x_ptr, scale_ptr, y_ptr,
    # strides, in elements
    scale_stride_m,
    # sizes
    M, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 elements on
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row = rows < M
    in_tile = is_row[:, None] & (ks < K)[None, :]
    at = rows[:, None] * K + ks[None, :]
    x = tl.load(x_ptr + at, mask=in_tile, other=0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
    scale = tl.load(scale_ptr + rows * scale_stride_m, mask=is_row, other=0.0)  # [BLOCK_M]
    tl.store(y_ptr + at, (x * scale[:, None]).to(y_ptr.dtype.element_ty), mask=in_tile)


def launch_bit_linear_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    """Map dy [M, N] and master weight [N, K] to dx [M, K] in the dtype of dy."""
    M, (N, K) = dy.shape[0], weight.shape
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    config = fitted_tiles("bit_linear_bwd_dx", dy.device, M=M, N=N, K=K)
    grid = (cdiv(K, config["BLOCK_K"]), cdiv(M, config["BLOCK_M"]))
    launch(_bit_linear_bwd_dx_kernel, grid)(
        dy, weight, stats, dx,
        M, N, K,
        BINARY=binary,
        TOKENS_LEFT=config.pop("TOKENS_LEFT", False),
        **config,
    )  # fmt: skip
    return dx


def launch_bit_linear_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Map dy [M, N], codes a [M, K] and a_scale [M, 1] to dweight [N, K] in ``dtype``."""
    (M, N), K = dy.shape, a.shape[1]
    dweight = torch.empty((N, K), dtype=dtype, device=dy.device)
    config = fitted_tiles("bit_linear_bwd_dweight", dy.device, M=M, N=N, K=K, dtype=dy.dtype)
    from_codes = bool(config.pop("FROM_CODES", True))
    x = a if from_codes else _dequantize_transposed(a, a_scale, dy.dtype).t()
    # neighbours along K read the same part of dy, the larger of the two
    grid = (cdiv(K, config["BLOCK_K"]), cdiv(N, config["BLOCK_N"]))
    launch(_bit_linear_bwd_dweight_kernel, grid)(
        dy, x, a_scale, dweight,
        *x.stride(),
        M, N, K,
        FROM_CODES=from_codes,
        **config,
    )  # fmt: skip
    return dweight


def _dequantize_transposed(a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Map codes a [M, K] and a_scale [M, 1] to x [K, M] in ``dtype``, with gaps between rows."""
    M, K = a.shape
    padded = torch.empty((K, M + _PADDING_BYTES // dtype.itemsize), dtype=dtype, device=a.device)
    config = tiles("bit_linear_bwd_dequantize", M, a.device)
    grid = (cdiv(M, config["BLOCK_M"]), cdiv(K, config["BLOCK_K"]))
    launch(_bit_linear_bwd_dequantize_kernel, grid)(
        a, a_scale, padded, padded.stride(0), M, K, **config
    )
    return padded[:, :M]


def launch_bit_linear_bwd_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply x [M, K] by scale, [M, 1] or the first of [2], in float32; round once to ``dtype``.

    A result in the dtype of ``x`` is written over it.
    """
    M, K = x.shape
    y = x if x.dtype == dtype else torch.empty((M, K), dtype=dtype, device=x.device)
    config = tiles("bit_linear_bwd_scale", M, x.device)
    grid = (cdiv(M, config["BLOCK_M"]), cdiv(K, config["BLOCK_K"]))
    launch(_bit_linear_bwd_scale_kernel, grid)(
        x, scale, y, scale.stride(0) if scale.ndim == 2 else 0, M, K, **config
    )
    return y
