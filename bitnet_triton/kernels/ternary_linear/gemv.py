"""Triton ternary linear for one token on an NVIDIA GPU: bound by memory and by latency.

A matrix of a small model is read in two microseconds, so what counts is what else stands between a
launch and its result. Every warp owns whole byte rows and reads 16 bytes a lane, all of a row at
once where registers allow it. Four bytes are multiplied where they stand, in one instruction
(dp4a), so nothing passes through shared memory; sums of integers need one instruction a row to be
added up over a warp. With two tokens tensor cores take as long (docs/gpu-kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, prefetch_rows, wait_for_inputs
from bitnet_triton.kernels.common.tiles import part_of_tile
from bitnet_triton.kernels.packing import CODES_PER_BYTE
from bitnet_triton.kernels.ternary_linear.merged import count_tiles, part_ends
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles
from bitnet_triton.runtime.device import is_interpreted

BYTES_PER_WORD = 4


@triton.jit
def _add_products(w, a, acc, DP4A: tl.constexpr) -> tl.tensor:
    """Add the products of four unsigned bytes of w and four signed bytes of a to acc, int32."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, a, acc], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        for byte in tl.static_range(4):
            acc += ((w >> (8 * byte)) & 255) * ((a << (24 - 8 * byte)) >> 24)
        return acc


@triton.jit
def _ternary_linear_fwd_one_kernel(
    # tensors: a [K] int8 as words; a_scale, a_sum [1]; packed [R, K] as words; scale [PARTS];
    # bias [4 R]; residual, y [4 R]
    a_ptr, a_scale_ptr, a_sum_ptr, packed_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    # sizes, K in words; where the first and the second part end
    R, K, end0, end1,
    # compile-time
    DEPENDENT: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    part, start, end, first = part_of_tile(tl.program_id(0), R, end0, end1, PARTS, BLOCK_R)
    prefetch_rows(packed_ptr, first, R, 4 * K, BLOCK_R, DEPENDENT)
    wait_for_inputs(DEPENDENT)
    # one tensor for all, [planes, BLOCK_R, BLOCK_K], so that nothing changes its place
    plane = tl.arange(0, 4)[:, None, None]
    # int64: row * K overflows int32 from 2**31 elements on
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_R)[None, :, None]
    ks = tl.arange(0, BLOCK_K)[None, None, :]
    is_row = rows < end
    # on their way before the weights: behind the loop a program would wait for them
    a_sum = tl.load(a_sum_ptr)
    scale = tl.load(a_scale_ptr) * tl.load(scale_ptr + part)

    codes_of_plane = 0x03030303 << (2 * plane)
    acc = tl.zeros((4, BLOCK_R, BLOCK_K), tl.int32)
    for k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        mask = is_row & (k + ks < K)
        packed = tl.load(packed_ptr + rows * K + (k + ks), mask=mask, other=0)
        # a row for each row of weights: in their places without a detour, and read once
        a = tl.load(a_ptr + 0 * rows + (k + ks), mask=mask, other=0)
        acc = _add_products(packed & codes_of_plane, a, acc, DP4A)

    # codes + 1 were multiplied where they stand, 1, 4, 16 and 64 times too large
    sums = (tl.sum(acc, 2, keep_dims=True) >> (2 * plane)) - a_sum  # [4, BLOCK_R, 1]
    y = sums.to(tl.float32) * scale
    # byte row r of a part holds its rows r, r + plane, r + 2 plane, r + 3 plane
    place = 3 * start + (end - start).to(tl.int64) * plane + rows
    if HAS_BIAS:
        y += tl.load(bias_ptr + place, mask=is_row, other=0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:  # rounded before it is added, as a sum of two tensors is
        residual = tl.load(residual_ptr + place, mask=is_row, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place, y, mask=is_row)


def in_words(a: Tensor, packed: Tensor) -> bool:
    """Tell whether rows of a and packed [rows, K] can be read four bytes at a time.

    If a is not int8 yet, it becomes a new tensor, which starts at such a place.
    """
    starts = packed.data_ptr() | (a.data_ptr() if a.dtype == torch.int8 else 0)
    return (packed.shape[1] | starts) % BYTES_PER_WORD == 0


def launch_ternary_linear_fwd_one(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [1, K], its scale and sum [1] and packed [N / 4, K] to y [1, N] in ``dtype``.

    ``packed`` holds a part of each of ``rows`` byte rows, with one of ``scale`` [PARTS]. K is less
    than ``IN_PLACE_K``, and ``in_words`` is true.
    """
    R, K = packed.shape
    y = torch.empty((1, CODES_PER_BYTE * R), dtype=dtype, device=a.device)
    config = tiles("ternary_linear_fwd_one", K, a.device)
    launch(_ternary_linear_fwd_one_kernel, (count_tiles(rows, config["BLOCK_R"]),))(
        a.view(torch.int32), a_scale, a_sum, packed.view(torch.int32), scale,
        scale if bias is None else bias, scale if residual is None else residual, y,
        R, K // BYTES_PER_WORD, *part_ends(rows),
        PARTS=len(rows), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        DP4A=a.device.type != "cpu" and not is_interpreted(),
        **config, **dependent(a.device),
        # a fused multiply-add would skip the rounding before the residual
        enable_fp_fusion=residual is None,
    )  # fmt: skip
    return y
