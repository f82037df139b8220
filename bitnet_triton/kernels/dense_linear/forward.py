"""Triton forward of the dense linear for a few rows. One program reads BLOCK_N rows of the weight.

Decoding multiplies one row by the largest matrix of the model, the output head: all that counts is
that every weight is read once, from both cores, in long stretches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.best.forward import launch_merge_best, store_best
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _dense_product(
    # tensors: x [M, K]; weight [N, K]; bias [N]
    x_ptr, weight_ptr, bias_ptr,
    # which tokens [BLOCK_M] and rows [BLOCK_N] are multiplied
    tokens, rows,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ks = tl.arange(0, BLOCK_K)
    is_token = tokens < M
    is_row = rows < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        weight = tl.load(
            weight_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0.0,
        )  # [BLOCK_N, BLOCK_K]  # fmt: skip
        x = tl.load(
            x_ptr + tokens[:, None] * K + (k + ks)[None, :],
            mask=is_token[:, None] & in_k[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")  # [BLOCK_M, BLOCK_N]

    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _dense_linear_fwd_kernel(
    # tensors: x [M, K]; weight [N, K]; bias [N]; y [M, N]
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 elements on
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M).to(tl.int64)
    y = _dense_product(
        x_ptr, weight_ptr, bias_ptr, tokens, rows, M, N, K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K
    )
    out = y_ptr + tokens[:, None] * N + rows[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < N)[None, :])


@triton.jit
def _dense_linear_topk_fwd_kernel(
    # tensors: x [M, K]; weight [N, K]; bias [N]; best [M, blocks of rows, BEST] int64
    x_ptr, weight_ptr, bias_ptr, best_ptr,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BEST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 elements on
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M).to(tl.int64)
    y = _dense_product(
        x_ptr, weight_ptr, bias_ptr, tokens, rows, M, N, K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K
    )
    best_ptrs = best_ptr + (tokens * tl.num_programs(0) + tl.program_id(0)) * BEST
    # what dense_linear would store decides, so that both agree
    store_best(y.to(x_ptr.dtype.element_ty), rows, N, best_ptrs, tokens < M, BEST)


def launch_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map x [M, K] to y [M, N] in its dtype; M is at most the largest size of the tiles."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    config = tiles("dense_linear_fwd", M, x.device)
    launch(_dense_linear_fwd_kernel, (cdiv(N, config["BLOCK_N"]),))(
        x, weight, bias if bias is not None else x, y,
        M, N, K,
        HAS_BIAS=bias is not None,
        **config,
    )  # fmt: skip
    return y


def launch_dense_linear_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Map as ``launch_dense_linear`` does, but only to the k largest: values, indices [M, k]."""
    (M, K), N = x.shape, weight.shape[0]
    config = tiles("dense_linear_fwd", M, x.device)
    programs = cdiv(N, config["BLOCK_N"])
    best = torch.empty((M, programs * k), dtype=torch.int64, device=x.device)
    launch(_dense_linear_topk_fwd_kernel, (programs,))(
        x, weight, bias if bias is not None else x, best,
        M, N, K,
        HAS_BIAS=bias is not None, BEST=k,
        **config,
    )  # fmt: skip
    return launch_merge_best(best, k, x.dtype)
