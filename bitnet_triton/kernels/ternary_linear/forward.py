"""Triton forward of the packed ternary linear.

One program owns a tile of the output and walks along K. It multiplies weights by activations
transposed, W x a^T, so that the weights, which are made in registers, are the left operand: tensor
cores read that one from registers. A CPU rearranges the right operand, so there many tokens are on
the left, and weights are rearranged once for all of them.

One tile of bytes holds four planes of rows, so a program keeps four accumulators and never shuffles
bits between lanes. It multiplies by codes + 1, which are what the bits say, and takes the surplus
off at the end: sum a w = sum a (w + 1) - sum a. GPUs multiply the codes where they stand in the
byte (``tiles.py``). A packed matrix may hold the bytes of several matrices below one another
(``merged.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.common.tiles import part_of_tile
from bitnet_triton.kernels.ternary_linear.merged import count_tiles, part_ends
from bitnet_triton.kernels.ternary_linear.tiles import (
    IN_PLACE_K,
    planes_in_place,
    store_plane,
    sums_in_place,
)
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _multiply(w, a, acc, TOKENS_LEFT: tl.constexpr):
    """Add w [BLOCK_R, BLOCK_K] times a [BLOCK_K, BLOCK_M] to acc, transposed if TOKENS_LEFT."""
    if TOKENS_LEFT:
        acc = tl.dot(tl.trans(a), tl.trans(w), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(w, a, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _ternary_linear_fwd_kernel(
    # tensors: a [M, K] int8; a_scale, a_sum [M]; packed [R, K]; scale [PARTS]; bias [4 R];
    # residual, y [M, 4 R]
    a_ptr, a_scale_ptr, a_sum_ptr, packed_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    # sizes; where the first and the second part end
    M, R, K, end0, end1,
    # compile-time
    DEPENDENT: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, TOKENS_LEFT: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    # int64: token * N and row * K overflow int32 from 2**31 elements on
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, start, end, first = part_of_tile(tl.program_id(0), R, end0, end1, PARTS, BLOCK_R)
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    is_token = tokens < M
    is_row = rows < end

    LEFT: tl.constexpr = BLOCK_M if TOKENS_LEFT else BLOCK_R
    RIGHT: tl.constexpr = BLOCK_R if TOKENS_LEFT else BLOCK_M
    acc0 = tl.zeros((LEFT, RIGHT), tl.int32)
    acc1 = tl.zeros((LEFT, RIGHT), tl.int32)
    acc2 = tl.zeros((LEFT, RIGHT), tl.int32)
    acc3 = tl.zeros((LEFT, RIGHT), tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        # beyond K the activations are 0, so any code will do there
        packed = tl.load(
            packed_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=is_row[:, None] & in_k[None, :], other=0,
        )  # [BLOCK_R, BLOCK_K]  # fmt: skip
        a = tl.load(
            a_ptr + tokens[None, :] * K + (k + ks)[:, None],
            mask=is_token[None, :] & in_k[:, None], other=0,
        )  # [BLOCK_K, BLOCK_M]  # fmt: skip
        if IN_PLACE:
            w0, w1, w2, w3 = planes_in_place(packed)  # [BLOCK_R, BLOCK_K] each
        else:
            w0 = (packed & 3).to(tl.int8)  # [BLOCK_R, BLOCK_K], and the three below
            w1 = ((packed >> 2) & 3).to(tl.int8)
            w2 = ((packed >> 4) & 3).to(tl.int8)
            w3 = (packed >> 6).to(tl.int8)
        acc0 = _multiply(w0, a, acc0, TOKENS_LEFT)  # [LEFT, RIGHT], and the three below
        acc1 = _multiply(w1, a, acc1, TOKENS_LEFT)
        acc2 = _multiply(w2, a, acc2, TOKENS_LEFT)
        acc3 = _multiply(w3, a, acc3, TOKENS_LEFT)
    if TOKENS_LEFT:
        acc0, acc1, acc2, acc3 = tl.trans(acc0), tl.trans(acc1), tl.trans(acc2), tl.trans(acc3)

    sums = tl.load(a_sum_ptr + tokens, mask=is_token, other=0)[None, :]
    if IN_PLACE:
        y0, y1, y2, y3 = sums_in_place(acc0, acc1, acc2, acc3, sums)
    else:
        y0, y1, y2, y3 = acc0 - sums, acc1 - sums, acc2 - sums, acc3 - sums
    scales = tl.load(a_scale_ptr + tokens, mask=is_token, other=0.0) * tl.load(scale_ptr + part)
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
        y2, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0 + 2 * plane,
        in_tile, N, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    store_plane(
        y3, y_ptr, bias_ptr, residual_ptr, scales, tokens, rows, row0 + 3 * plane,
        in_tile, N, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def launch_ternary_linear_fwd(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [M, K], its scale and sum [M] and packed [N / 4, K] to y [M, N] in ``dtype``.

    ``packed`` holds a part of each of ``rows`` byte rows, with one of ``scale`` [PARTS].
    """
    (M, K), R = a.shape, packed.shape[0]
    y = torch.empty((M, 4 * R), dtype=dtype, device=a.device)
    config = {"TOKENS_LEFT": False, "IN_PLACE": False, **tiles("ternary_linear_fwd", M, a.device)}
    config["IN_PLACE"] &= K < IN_PLACE_K
    grid = (count_tiles(rows, config["BLOCK_R"]), cdiv(M, config["BLOCK_M"]))
    launch(_ternary_linear_fwd_kernel, grid)(
        a, a_scale, a_sum, packed, scale, scale if bias is None else bias,
        scale if residual is None else residual, y,
        M, R, K, *part_ends(rows),
        PARTS=len(rows), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **config, **dependent(a.device),
        # a fused multiply-add would skip the rounding before the residual
        enable_fp_fusion=residual is None,
    )  # fmt: skip
    return y
