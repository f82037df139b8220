"""Triton forward of the trainable ternary linear.

One program owns a tile of the output and walks along K. It quantises the tile of master weights on
the way: no quantised copy of the weights is ever written. Which operand stands on the left is up
to the device. Tensor cores read the left one from registers, where the weights are made; a CPU
reads the left one from where it lies, so there it is the activations, which are in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.bit_linear.tiles import weight_codes
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import fitted_tiles


@triton.jit
def _bit_linear_fwd_kernel(
    # tensors: a [M, K] int8; a_scale [M]; weight [N, K]; stats [2]; bias [N]; y [M, N]
    a_ptr, a_scale_ptr, weight_ptr, stats_ptr, bias_ptr, y_ptr,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, BINARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    # int64: token * N and row * K overflow int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    is_token = tokens < M
    is_row = rows < N
    scale = tl.load(stats_ptr)
    mean = tl.load(stats_ptr + 1)

    LEFT: tl.constexpr = BLOCK_M if TOKENS_LEFT else BLOCK_N
    RIGHT: tl.constexpr = BLOCK_N if TOKENS_LEFT else BLOCK_M
    acc = tl.zeros((LEFT, RIGHT), tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        weight = tl.load(
            weight_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0.0,
        )  # [BLOCK_N, BLOCK_K]  # fmt: skip
        # beyond K the activations are 0, so any code will do there
        a = tl.load(
            a_ptr + tokens[:, None] * K + (k + ks)[None, :],
            mask=is_token[:, None] & in_k[None, :], other=0,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        codes = weight_codes(weight, scale, mean, BINARY, tl.int8)
        if TOKENS_LEFT:
            acc = tl.dot(a, tl.trans(codes), acc, out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        else:
            acc = tl.dot(codes, tl.trans(a), acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
    if not TOKENS_LEFT:
        acc = tl.trans(acc)

    scales = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0) * scale
    y = acc.to(tl.float32) * scales[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + tokens[:, None] * N + rows[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def launch_bit_linear_fwd(
    a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, bias: Tensor | None, binary: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [M, K], a_scale [M, 1] and master weight [N, K] to y [M, N] in ``dtype``."""
    (M, K), N = a.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    config = fitted_tiles("bit_linear_fwd", a.device, M=M, N=N, K=K)
    grid = (triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(M, config["BLOCK_M"]))
    launch(_bit_linear_fwd_kernel, grid)(
        a, a_scale, weight, stats, stats if bias is None else bias, y,
        M, N, K,
        HAS_BIAS=bias is not None,
        BINARY=binary,
        TOKENS_LEFT=config.pop("TOKENS_LEFT", False),
        **config,
    )  # fmt: skip
    return y
