"""Triton ternary linear for few tokens on a GPU, which read every weight once: bound by memory.

One program owns BLOCK_R byte rows and walks along K, SLICES slices of BLOCK_K columns at a time.
The slices are the batch of one batched product, so that each warp sums a slice of its own and waits
for no other; they are added at the end. As many bytes are on their way from memory at once as if K
were split over programs, but there is no second kernel that adds up; and sums of integers do not
depend on their order. Tensor cores multiply, though most columns may be padding: an instruction for
each weight and token would take longer than reading the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, prefetch_rows, wait_for_inputs
from bitnet_triton.kernels.common.tiles import part_of_tile
from bitnet_triton.kernels.ternary_linear.merged import count_tiles, part_ends
from bitnet_triton.kernels.ternary_linear.tiles import planes_in_place, store_plane, sums_in_place
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import has_tiles, tiles

# As many byte rows are no more than half a program for each multiprocessor of a large GPU
_NARROW_R = 1024


@triton.jit
def _ternary_linear_fwd_few_kernel(
    # tensors: a [M, K] int8; a_scale, a_sum [M]; packed [R, K]; scale [PARTS]; bias [4 R];
    # residual, y [M, 4 R]
    a_ptr, a_scale_ptr, a_sum_ptr, packed_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    # sizes; where the first and the second part end
    M, R, K, end0, end1,
    # compile-time
    DEPENDENT: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    # int64: token * N and row * K overflow int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, start, end, first = part_of_tile(tl.program_id(0), R, end0, end1, PARTS, BLOCK_R)
    prefetch_rows(packed_ptr, first, R, K, BLOCK_R, DEPENDENT)
    wait_for_inputs(DEPENDENT)
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_token = tokens < M
    is_row = rows < end

    # on their way before the weights: behind the loop a program would wait for them
    sums = tl.load(a_sum_ptr + tokens, mask=is_token, other=0)[None, :]
    scales = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0) * tl.load(scale_ptr + part)

    acc0 = tl.zeros((SLICES, BLOCK_R, BLOCK_M), tl.int32)
    acc1 = tl.zeros((SLICES, BLOCK_R, BLOCK_M), tl.int32)
    acc2 = tl.zeros((SLICES, BLOCK_R, BLOCK_M), tl.int32)
    acc3 = tl.zeros((SLICES, BLOCK_R, BLOCK_M), tl.int32)
    for k in range(0, K, SLICES * BLOCK_K):
        in_k = k + ks < K
        # beyond K the activations are 0, so any code will do there
        packed = tl.load(
            packed_ptr + rows[None, :, None] * K + (k + ks)[:, None, :],
            mask=is_row[None, :, None] & in_k[:, None, :], other=0,
        )  # [SLICES, BLOCK_R, BLOCK_K]  # fmt: skip
        a = tl.load(
            a_ptr + tokens[None, None, :] * K + (k + ks)[:, :, None],
            mask=is_token[None, None, :] & in_k[:, :, None], other=0,
        )  # [SLICES, BLOCK_K, BLOCK_M]  # fmt: skip
        w0, w1, w2, w3 = planes_in_place(packed)
        acc0 = tl.dot(w0, a, acc0, out_dtype=tl.int32)  # [SLICES, BLOCK_R, BLOCK_M], and below
        acc1 = tl.dot(w1, a, acc1, out_dtype=tl.int32)
        acc2 = tl.dot(w2, a, acc2, out_dtype=tl.int32)
        acc3 = tl.dot(w3, a, acc3, out_dtype=tl.int32)

    y0, y1, y2, y3 = sums_in_place(
        tl.sum(acc0, 0), tl.sum(acc1, 0), tl.sum(acc2, 0), tl.sum(acc3, 0), sums
    )  # [BLOCK_R, BLOCK_M] each
    in_tile = is_row[:, None] & is_token[None, :]
    N = 4 * R
    # byte row r of a part holds its rows r, r + plane, r + 2 plane, r + 3 plane
    plane = end - start
    row0 = 3 * start
    store_plane(
        y0, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0, in_tile, N,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    store_plane(
        y1, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0 + plane, in_tile, N,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    store_plane(
        y2, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0 + 2 * plane, in_tile, N,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    store_plane(
        y3, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0 + 3 * plane, in_tile, N,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def _kernel(R: int, device: torch.device) -> str:
    """Return what the tiles are called: with few programs, each of them takes more warps."""
    narrow = "ternary_linear_fwd_few_narrow"
    return narrow if R <= _NARROW_R and has_tiles(narrow, device) else "ternary_linear_fwd_few"


def launch_ternary_linear_fwd_few(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [M, K], its scale and sum [M] and packed [N / 4, K] to y [M, N] in ``dtype``.

    ``packed`` holds a part of each of ``rows`` byte rows, with one of ``scale`` [PARTS]. K is less
    than ``IN_PLACE_K``.
    """
    (M, K), R = a.shape, packed.shape[0]
    y = torch.empty((M, 4 * R), dtype=dtype, device=a.device)
    config = tiles(_kernel(R, a.device), M, a.device)
    grid = (count_tiles(rows, config["BLOCK_R"]), cdiv(M, config["BLOCK_M"]))
    launch(_ternary_linear_fwd_few_kernel, grid)(
        a, a_scale, a_sum, packed, scale, scale if bias is None else bias,
        scale if residual is None else residual, y,
        M, R, K, *part_ends(rows),
        PARTS=len(rows), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **config, **dependent(a.device),
        # a fused multiply-add would skip the rounding before the residual
        enable_fp_fusion=residual is None,
    )  # fmt: skip
    return y
