# ruff: noqa: ANN001, ANN202 - Triton reads these signatures, Python does not
"""The Triton kernels of the case ``triton_cpu``: what anybody would write, with no trick for CPUs.

Nothing here knows how it runs: compiled for the CPU, or in Triton's interpreter where the process
was started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton import triton_cpu

# Tried on two cores with AVX-512, 1 MB of second-level cache each
ATTENTION_TILES = {"BLOCK_M": 128, "BLOCK_N": 128}
MATMUL_TILES = {
    torch.float32: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128},
    torch.bfloat16: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 256},
    torch.int8: {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 512},
}
SOFTMAX_ROWS = 4
ADD_BLOCK = 4096

_LOG2_E = 1.4426950408889634


@triton.jit
def _attention_fwd_kernel(
    # tensors: q, k, v, out [heads, T, D]
    q_ptr, k_ptr, v_ptr, out_ptr,
    # sizes and scalars
    T, scale_log2,
    # compile-time
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: head * T * D overflows int32 from 2**31 elements on
    head = tl.program_id(1).to(tl.int64) * T * D
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    is_query = (queries < T)[:, None]
    at_query = head + queries[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + at_query, mask=is_query, other=0.0)  # [BLOCK_M, D]

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, T) if CAUSAL else T
    for n in range(0, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        is_key = (keys < T)[:, None]
        at_key = head + keys[:, None] * D + dims[None, :]
        k = tl.load(k_ptr + at_key, mask=is_key, other=0.0)  # [BLOCK_N, D]
        v = tl.load(v_ptr + at_key, mask=is_key, other=0.0)  # [BLOCK_N, D]

        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        is_visible = keys[None, :] < T
        if CAUSAL:
            is_visible = is_visible & (keys[None, :] <= queries[:, None])
        scores = tl.where(is_visible, scores * scale_log2, float("-inf"))

        # finite: every query sees key 0, which stands in the first tile
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, D]
        top = new_top

    out = acc / total[:, None]
    tl.store(out_ptr + at_query, out.to(out_ptr.dtype.element_ty), mask=is_query)


@triton.jit
def _matmul_kernel(
    # tensors: a [M, K]; b [K, N], in any order; out [M, N]
    a_ptr, b_ptr, out_ptr,
    # strides, in elements
    b_stride_k, b_stride_n,
    # sizes
    M, N, K,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM_TYPE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = (rows < M)[:, None]
    is_col = (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM_TYPE)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_ptr + rows[:, None] * K + ks[None, :], mask=is_row & (ks < K)[None, :], other=0
        )  # [BLOCK_M, BLOCK_K]
        b = tl.load(
            b_ptr + ks[:, None] * b_stride_k + cols[None, :] * b_stride_n,
            mask=(ks < K)[:, None] & is_col, other=0,
        )  # [BLOCK_K, BLOCK_N]  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=SUM_TYPE)  # [BLOCK_M, BLOCK_N]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], out, mask=is_row & is_col)


@triton.jit
def _softmax_kernel(
    # tensors: x, out [M, N]
    x_ptr, out_ptr,
    # sizes
    M, N,
    # compile-time
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # beyond the last row it is done again, so that no row is empty
    rows = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    cols = tl.arange(0, BLOCK_N)
    in_row = (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + at, mask=in_row, other=float("-inf"))  # [BLOCK_M, BLOCK_N]
    weights = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(out_ptr + at, weights / tl.sum(weights, 1)[:, None], mask=in_row)


@triton.jit
def _add_kernel(
    # tensors: x, y, out [N]
    x_ptr, y_ptr, out_ptr,
    # sizes
    N,
    # compile-time
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    y = tl.load(y_ptr + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, x + y, mask=at < N)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Map q, k, v [B, H, T, D] to softmax(q k^T / sqrt(D)) v in their dtype."""
    B, H, T, D = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(T, ATTENTION_TILES["BLOCK_M"]), B * H)
    triton_cpu.launch(_attention_fwd_kernel, grid)(
        q, k, v, out,
        T, _LOG2_E * D**-0.5,
        D=D, CAUSAL=causal,
        **ATTENTION_TILES,
    )  # fmt: skip
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [M, K] by b [K, N], a view in any order; int8 gives int32, else their dtype."""
    (M, K), N = a.shape, b.shape[1]
    whole = a.dtype == torch.int8
    out = torch.empty((M, N), dtype=torch.int32 if whole else a.dtype)
    tiles = MATMUL_TILES[a.dtype]
    grid = (triton.cdiv(M, tiles["BLOCK_M"]), triton.cdiv(N, tiles["BLOCK_N"]))
    triton_cpu.launch(_matmul_kernel, grid)(
        a, b, out,
        *b.stride(),
        M, N, K,
        SUM_TYPE=tl.int32 if whole else tl.float32,
        **tiles,
    )  # fmt: skip
    return out


def softmax(x: Tensor, out: Tensor) -> Tensor:
    """Write the softmax of each row of x [M, N] into ``out``."""
    M, N = x.shape
    triton_cpu.launch(_softmax_kernel, (triton.cdiv(M, SOFTMAX_ROWS),))(
        x, out, M, N, BLOCK_M=SOFTMAX_ROWS, BLOCK_N=triton.next_power_of_2(N)
    )
    return out


def add(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Write x + y, all [N], into ``out``."""
    N = x.numel()
    block = min(ADD_BLOCK, triton.next_power_of_2(N))
    triton_cpu.launch(_add_kernel, (triton.cdiv(N, block),))(x, y, out, N, BLOCK=block)
    return out
