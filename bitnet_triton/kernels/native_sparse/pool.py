"""Triton kernels of pooling: blocks sum their tokens, tokens gather from the blocks that hold them.

Nothing is added by atomics: a token lies in block / stride blocks, and reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, store_rows
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _block_rows(first_ptr, n, is_block, batch, N, stride) -> tl.tensor:
    """Return the first token of each block; -1 where there is none."""
    if first_ptr is None:
        return tl.where(is_block, n * stride, -1)
    else:
        return tl.load(first_ptr + batch * N + n, mask=is_block, other=-1)


@triton.jit
def _compress_blocks_fwd_kernel(
    # tensors: x [B T Hk D]; weights [Hk L] or None; first int32 [B N] or None; y [B N Hk D]
    x_ptr, weights_ptr, first_ptr, y_ptr,
    # strides, in elements
    x_stride_b, x_stride_t, x_stride_h,
    # sizes
    N, Hk, block, stride,
    # compile-time
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = _block_rows(first_ptr, n, n < N, batch, N, stride)
    x_ptr += batch * x_stride_b + head * x_stride_h
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for r in range(block):
        weight = 1.0 / block
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + head * block + r).to(tl.float32)
        x = load_rows(x_ptr, start + r, x_stride_t, start >= 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        total += x.to(tl.float32) * weight
    store_rows(y_ptr, (batch * N + n) * Hk + head, D, total, n < N, D, BLOCK_D)


@triton.jit
def _compress_blocks_bwd_dx_kernel(
    # tensors: dy [B N Hk D]; weights [Hk L] or None; places int32 [3 B T] or None; dx [B T Hk D]
    dy_ptr, weights_ptr, places_ptr, dx_ptr,
    # sizes
    T, N, Hk, block, stride,
    # compile-time
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = t
    first = t * 0
    count = t * 0 + N
    if places_ptr is not None:
        plane = tl.num_programs(2).to(tl.int64) * T
        at = places_ptr + batch * T + t
        place = tl.load(at, mask=t < T, other=-1)
        first = tl.load(at + plane, mask=t < T, other=0)
        count = tl.load(at + 2 * plane, mask=t < T, other=0)
    is_token = (t < T) & (place >= 0)
    last = tl.maximum(place, 0) // stride
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for a in range(block // stride):
        n = last - a
        is_inside = is_token & (n >= 0) & (n < count)
        dy = load_rows(dy_ptr, (batch * N + first + n) * Hk + head, D, is_inside, D, BLOCK_D)
        if weights_ptr is not None:
            r = place - n * stride
            weight = tl.load(weights_ptr + head * block + r, mask=is_inside, other=0.0)
            total += dy.to(tl.float32) * weight.to(tl.float32)[:, None]  # [BLOCK_N, BLOCK_D]
        else:
            total += dy.to(tl.float32)
    if weights_ptr is None:
        total *= 1.0 / block
    store_rows(dx_ptr, (batch * T + t) * Hk + head, D, total, t < T, D, BLOCK_D)


@triton.jit
def _compress_blocks_bwd_dw_kernel(
    # tensors: dy [B N Hk D]; x [B T Hk D]; first int32 [B N] or None; parts [B C Hk L] float32
    dy_ptr, x_ptr, first_ptr, parts_ptr,
    # strides, in elements
    x_stride_b, x_stride_t, x_stride_h,
    # sizes
    N, Hk, block, stride,
    # compile-time
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program sums over its tile of blocks; the sums of C tiles are added up elsewhere."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = _block_rows(first_ptr, n, n < N, batch, N, stride)
    x_ptr += batch * x_stride_b + head * x_stride_h
    dy = load_rows(dy_ptr, (batch * N + n) * Hk + head, D, start >= 0, D, BLOCK_D)
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * Hk + head
    for r in range(block):
        x = load_rows(x_ptr, start + r, x_stride_t, start >= 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        products = x.to(tl.float32) * dy.to(tl.float32)
        tl.store(parts_ptr + part * block + r, tl.sum(tl.sum(products, axis=1), axis=0))


def _sizes(t: Tensor) -> tuple[int, int]:
    """Return the batch, 1 where packed, and the rows of t."""
    return (1 if t.ndim == 3 else t.shape[0]), t.shape[-3]


def _strides(t: Tensor) -> tuple[int, ...]:
    return (0, *t.stride()[:2]) if t.ndim == 3 else t.stride()[:3]


def launch_pool(
    x: Tensor, weights: Tensor | None, first: Tensor | None, count: int, block: int, stride: int
) -> Tensor:
    """Map x [B T Hk D] to blocks [B N Hk D]; ``first`` as ``block_tokens`` returns it."""
    *lead, _, Hk, D = x.shape
    y = torch.empty((*lead, count, Hk, D), dtype=x.dtype, device=x.device)
    config = tiles("compress_blocks_fwd", D, x.device)
    weights = None if weights is None else weights.contiguous()
    launch(_compress_blocks_fwd_kernel, (cdiv(count, config["BLOCK_N"]), Hk, _sizes(x)[0]))(
        x, weights, first, y, *_strides(x), count, Hk, block, stride, D=D, **config
    )
    return y


def launch_pool_bwd(
    dy: Tensor, weights: Tensor | None, places: Tensor | None, T: int, block: int, stride: int
) -> Tensor:
    """Return the gradient of x [B T Hk D] from dy [B N Hk D]; ``places`` of ``token_places``."""
    *lead, N, Hk, D = dy.shape
    dx = torch.empty((*lead, T, Hk, D), dtype=dy.dtype, device=dy.device)
    config = tiles("compress_blocks_bwd_dx", D, dy.device)
    weights = None if weights is None else weights.contiguous()
    launch(_compress_blocks_bwd_dx_kernel, (cdiv(T, config["BLOCK_N"]), Hk, _sizes(dy)[0]))(
        dy, weights, places, dx, T, N, Hk, block, stride, D=D, **config
    )
    return dx


def launch_pool_bwd_dw(
    dy: Tensor, x: Tensor, weights: Tensor, first: Tensor | None, block: int, stride: int
) -> Tensor:
    """Return the gradient of weights [Hk L]."""
    (B, N), (Hk, D) = _sizes(dy), dy.shape[-2:]
    config = tiles("compress_blocks_bwd_dw", D, x.device)
    chunks = cdiv(N, config["BLOCK_N"])
    parts = torch.empty((B, chunks, Hk, block), dtype=torch.float32, device=x.device)
    launch(_compress_blocks_bwd_dw_kernel, (chunks, Hk, B))(
        dy, x, first, parts, *_strides(x), N, Hk, block, stride, D=D, **config
    )
    return parts.sum((0, 1)).to(weights.dtype)
