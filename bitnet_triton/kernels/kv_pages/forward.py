"""Triton kernels that fill pages: one program writes a token, or copies a part of a page."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles


@triton.jit
def _write_pages_kernel(
    # tensors: k [T Hk D]; v [T Hk DV]; k_pages [P page Hk D]; v_pages [P page Hk DV]; slots [T]
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr,
    # strides, in elements
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, kp_stride_p, kp_stride_t, kp_stride_h,
    vp_stride_p, vp_stride_t, vp_stride_h,
    # sizes
    Hk, end,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    if (slot < 0) | (slot >= end):
        return
    page, place = slot // PAGE, slot % PAGE
    _copy_heads(
        k_ptr + t * k_stride_t, k_stride_h,
        k_pages_ptr + page * kp_stride_p + place * kp_stride_t, kp_stride_h, Hk, D, BLOCK_H,
    )  # fmt: skip
    _copy_heads(
        v_ptr + t * v_stride_t, v_stride_h,
        v_pages_ptr + page * vp_stride_p + place * vp_stride_t, vp_stride_h, Hk, DV, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _copy_heads(
    from_ptr, from_stride, to_ptr, to_stride, Hk, D: tl.constexpr, BLOCK_H: tl.constexpr
):
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    dims = tl.arange(0, BLOCK_D)
    for first in range(0, Hk, BLOCK_H):
        heads = first + tl.arange(0, BLOCK_H)
        row = load_rows(from_ptr, heads, from_stride, heads < Hk, D, BLOCK_D)  # [BLOCK_H, BLOCK_D]
        at = to_ptr + heads.to(tl.int64)[:, None] * to_stride + dims[None, :]
        tl.store(at, row, mask=(heads < Hk)[:, None] & (dims < D)[None, :])


@triton.jit
def _copy_pages_kernel(
    # tensors: pages [P E]; pairs [N 2], from and to
    pages_ptr, pairs_ptr,
    # strides, in elements
    stride_p,
    # sizes
    P, E,
    # compile-time
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    source = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    target = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    if (source < 0) | (target < 0) | (source >= P) | (target >= P):
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(pages_ptr + source * stride_p + at, mask=at < E, other=0.0)  # [BLOCK]
    tl.store(pages_ptr + target * stride_p + at, values, mask=at < E)


def launch_write_pages(
    k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor
) -> None:
    """Write tokens k [T Hk D] and v [T Hk Dv] to their ``slots`` [T] of the pages."""
    (T, Hk, D), DV = k.shape, v.shape[-1]
    P, PAGE = k_pages.shape[:2]
    launch(_write_pages_kernel, (T,))(
        k, v, k_pages, v_pages, slots,
        *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        Hk, P * PAGE, D=D, DV=DV, PAGE=PAGE,
        **tiles("write_pages", head_size(max(D, DV), k.dtype), k.device), **dependent(k.device),
    )  # fmt: skip


def launch_copy_pages(pages: Tensor, pairs: Tensor) -> None:
    """Copy whole pages [P ...], each contiguous, from pairs[:, 0] to pairs[:, 1]."""
    size = pages[0].numel()
    config = tiles("copy_pages", size, pages.device)
    launch(_copy_pages_kernel, (cdiv(size, config["BLOCK"]), pairs.shape[0]))(
        pages, pairs, pages.stride(0), pages.shape[0], size, **config
    )
