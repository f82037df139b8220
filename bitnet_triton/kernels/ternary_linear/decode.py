"""Triton ternary linear for one row of activations. One program sums BLOCK_R byte rows over K.

Decoding reads every weight once and is bound by memory: no tensor cores, one pass over the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _store_rows(sums, y_ptr, bias_ptr, scale, rows, is_row, HAS_BIAS: tl.constexpr):
    y = sums.to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _ternary_linear_fwd_row_kernel(
    # tensors: a [K] int8; a_scale, a_sum [1]; packed [R, K]; scale [1]; bias [4 R]; y [4 R]
    a_ptr, a_scale_ptr, a_sum_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr,
    # sizes
    R, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: row * K overflows int32 from 2**31 bytes on
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    is_row = rows < R

    sum0 = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    sum1 = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    sum2 = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    sum3 = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        packed = tl.load(
            packed_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0,
        ).to(tl.int32)  # [BLOCK_R, BLOCK_K]  # fmt: skip
        a = tl.load(a_ptr + k + ks, mask=in_k, other=0).to(tl.int32)[None, :]  # [1, BLOCK_K]
        sum0 += (packed & 3) * a
        sum1 += ((packed >> 2) & 3) * a
        sum2 += ((packed >> 4) & 3) * a
        sum3 += (packed >> 6) * a

    scale = tl.load(scale_ptr) * tl.load(a_scale_ptr)
    # the bits say code + 1: what that is too much is the sum of the activations
    surplus = tl.load(a_sum_ptr)
    y0, y1 = tl.sum(sum0, axis=1) - surplus, tl.sum(sum1, axis=1) - surplus
    y2, y3 = tl.sum(sum2, axis=1) - surplus, tl.sum(sum3, axis=1) - surplus
    _store_rows(y0, y_ptr, bias_ptr, scale, rows, is_row, HAS_BIAS)
    _store_rows(y1, y_ptr, bias_ptr, scale, rows + R, is_row, HAS_BIAS)
    _store_rows(y2, y_ptr, bias_ptr, scale, rows + 2 * R, is_row, HAS_BIAS)
    _store_rows(y3, y_ptr, bias_ptr, scale, rows + 3 * R, is_row, HAS_BIAS)


def launch_ternary_linear_fwd_row(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [1, K], its scale and sum [1] and packed [N / 4, K] to y [1, N] in ``dtype``."""
    R, K = packed.shape
    y = torch.empty((1, 4 * R), dtype=dtype, device=a.device)
    config = tiles("ternary_linear_fwd_row", 1, a.device)
    launch(_ternary_linear_fwd_row_kernel, (triton.cdiv(R, config["BLOCK_R"]),))(
        a, a_scale, a_sum, packed, scale, bias if bias is not None else scale, y,
        R, K,
        HAS_BIAS=bias is not None,
        **config,
    )  # fmt: skip
    return y
