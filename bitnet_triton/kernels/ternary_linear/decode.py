"""Triton ternary linear for one row of activations. One program sums BLOCK_R byte rows over K.

Decoding reads every weight once and is bound by memory: no tensor cores, one pass over the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.tiles import part_of_tile
from bitnet_triton.kernels.ternary_linear.merged import count_tiles, part_ends
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _store_rows(
    sums, y_ptr, bias_ptr, residual_ptr, scale, rows, is_row,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    y = sums.to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows, mask=is_row, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows, y, mask=is_row)


@triton.jit
def _ternary_linear_fwd_row_kernel(
    # tensors: a [K] int8; a_scale, a_sum [1]; packed [R, K]; scale [PARTS];
    # bias, residual, y [4 R]
    a_ptr, a_scale_ptr, a_sum_ptr, packed_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    # sizes; where the first and the second part end
    R, K, end0, end1,
    # compile-time
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, start, end, first = part_of_tile(tl.program_id(0), R, end0, end1, PARTS, BLOCK_R)
    # int64: row * K overflows int32 from 2**31 bytes on
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    is_row = rows < end

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

    scale = tl.load(scale_ptr + part) * tl.load(a_scale_ptr)
    # the bits say code + 1: what that is too much is the sum of the activations
    surplus = tl.load(a_sum_ptr)
    y0, y1 = tl.sum(sum0, axis=1) - surplus, tl.sum(sum1, axis=1) - surplus
    y2, y3 = tl.sum(sum2, axis=1) - surplus, tl.sum(sum3, axis=1) - surplus
    # byte row r of a part holds its rows r, r + plane, r + 2 plane, r + 3 plane
    plane = end - start
    rows += 3 * start
    _store_rows(y0, y_ptr, bias_ptr, residual_ptr, scale, rows, is_row, HAS_BIAS, HAS_RESIDUAL)
    rows += plane
    _store_rows(y1, y_ptr, bias_ptr, residual_ptr, scale, rows, is_row, HAS_BIAS, HAS_RESIDUAL)
    rows += plane
    _store_rows(y2, y_ptr, bias_ptr, residual_ptr, scale, rows, is_row, HAS_BIAS, HAS_RESIDUAL)
    rows += plane
    _store_rows(y3, y_ptr, bias_ptr, residual_ptr, scale, rows, is_row, HAS_BIAS, HAS_RESIDUAL)


def launch_ternary_linear_fwd_row(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [1, K], its scale and sum [1] and packed [N / 4, K] to y [1, N] in ``dtype``.

    ``packed`` holds a part of each of ``rows`` byte rows, with one of ``scale`` [PARTS].
    """
    R, K = packed.shape
    y = torch.empty((1, 4 * R), dtype=dtype, device=a.device)
    config = tiles("ternary_linear_fwd_row", 1, a.device)
    launch(_ternary_linear_fwd_row_kernel, (count_tiles(rows, config["BLOCK_R"]),))(
        a, a_scale, a_sum, packed, scale, scale if bias is None else bias,
        scale if residual is None else residual, y,
        R, K, *part_ends(rows),
        PARTS=len(rows), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **config,
        # a fused multiply-add would skip the rounding before the residual
        enable_fp_fusion=residual is None,
    )  # fmt: skip
    return y
