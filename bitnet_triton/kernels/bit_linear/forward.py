"""Triton forward of the trainable ternary linear.

One program owns a tile of the output and walks along K. There are two ways to the weights.

On a CPU, and on a GPU for few tokens, it quantises the tile of master weights on the way:
no quantised copy of the weights is written. Which operand stands on the left is up to the device.
Tensor cores read the left one from registers, where the weights are made; a CPU reads the left one
from where it lies, so there it is the activations, which are in memory.

More tokens on a GPU would have every tile of them quantise all weights again, in registers and in
step with the product, which costs more than the product: 2048 tokens, 2560 -> 6912, took an H200
150 us with the best tiles, where a product of two int8 operands in memory takes 71. So the codes
are written once, one byte a weight, in a pass over memory, and the product reads them. They are
a temporary of the call: nothing of it is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.bit_linear.tiles import weight_codes
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import fitted_tiles, tiles


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


@triton.jit
def _bit_linear_codes_kernel(
    # tensors: weight [SIZE]; stats [2]; codes [SIZE]
    weight_ptr, stats_ptr, codes_ptr,
    # sizes
    SIZE,
    # compile-time
    BINARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # int64: a weight may have more than 2**31 elements
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(stats_ptr)
    mean = tl.load(stats_ptr + 1)
    weight = tl.load(weight_ptr + at, mask=at < SIZE, other=0.0)  # [BLOCK]
    codes = weight_codes(weight, scale, mean, BINARY, codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + at, codes, mask=at < SIZE)


@triton.jit
def _bit_linear_fwd_from_codes_kernel(
    # tensors: a [M, K] int8; a_scale [M]; codes [N, K] int8; stats [2]; bias [N]; y [M, N]
    a_ptr, a_scale_ptr, codes_ptr, stats_ptr, bias_ptr, y_ptr,
    # sizes
    M, N, K,
    # compile-time
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs that run together own a block of tiles: they share as much of both operands as can be
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP
    )
    # int64: token * N and row * K overflow int32 from 2**31 elements on
    tokens = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    # beyond the last token or row stands the last one again, in place of a mask in the loop: what
    # comes of it is not stored
    a = a_ptr + tl.minimum(tokens, M - 1)[:, None] * K + ks[None, :]
    codes = codes_ptr + tl.minimum(rows, N - 1)[:, None] * K + ks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            left = tl.load(a)  # [BLOCK_M, BLOCK_K]
            right = tl.load(codes)  # [BLOCK_N, BLOCK_K]
        else:
            in_k = (k + ks < K)[None, :]
            left = tl.load(a, mask=in_k, other=0)
            right = tl.load(codes, mask=in_k, other=0)
        acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        a += BLOCK_K
        codes += BLOCK_K

    is_token = tokens < M
    is_row = rows < N
    scales = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0) * tl.load(stats_ptr)
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
    grid = (cdiv(N, config["BLOCK_N"]), cdiv(M, config["BLOCK_M"]))
    launch(_bit_linear_fwd_kernel, grid)(
        a, a_scale, weight, stats, stats if bias is None else bias, y,
        M, N, K,
        HAS_BIAS=bias is not None,
        BINARY=binary,
        TOKENS_LEFT=config.pop("TOKENS_LEFT", False),
        **config,
    )  # fmt: skip
    return y


def launch_bit_linear_codes(
    weight: Tensor, stats: Tensor, binary: bool, dtype: torch.dtype
) -> Tensor:
    """Map master weight [N, K] to its codes [N, K] in ``dtype``."""
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = weight.numel()
    config = tiles("bit_linear_codes", size, weight.device)
    launch(_bit_linear_codes_kernel, (cdiv(size, config["BLOCK"]),))(
        weight, stats, codes, size, BINARY=binary, **config
    )
    return codes


def launch_bit_linear_fwd_from_codes(
    a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, bias: Tensor | None, binary: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Do what ``launch_bit_linear_fwd`` does, by codes of the weight that are written once."""
    (M, K), N = a.shape, weight.shape[0]
    codes = launch_bit_linear_codes(weight, stats, binary, torch.int8)
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    config = tiles("bit_linear_fwd_from_codes", M, a.device)
    grid = (cdiv(N, config["BLOCK_N"]), cdiv(M, config["BLOCK_M"]))
    launch(_bit_linear_fwd_from_codes_kernel, grid)(
        a, a_scale, codes, stats, stats if bias is None else bias, y,
        M, N, K,
        HAS_BIAS=bias is not None,
        EVEN_K=K % config["BLOCK_K"] == 0,
        **config,
    )  # fmt: skip
    return y
