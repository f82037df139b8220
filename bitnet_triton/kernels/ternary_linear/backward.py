"""Triton backward of the packed ternary linear: dx.

Straight-through (arXiv:2310.11453, section 2): dx = dy (beta w). Weights are made in registers and
stand on the left, as in the forward; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import cdiv, launch
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


def launch_ternary_linear_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Map dy [M, N] to dx [M, K] in its dtype."""
    M, (R, K) = dy.shape[0], packed.shape
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    config = tiles("ternary_linear_bwd", M, dy.device, dy.dtype)
    grid = (cdiv(K, config["BLOCK_K"]), cdiv(M, config["BLOCK_M"]))
    launch(_ternary_linear_bwd_kernel, grid)(dy, packed, scale, dx, M, R, K, **config)
    return dx
