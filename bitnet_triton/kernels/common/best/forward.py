"""Triton pieces that find the largest outputs of a product without writing the others.

A value and its index make one int64, its rank: ranks order like the values, and of equal values the
one with the smaller index ranks higher. Programs of the product keep the highest ranks of their
rows; one program a token merges them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _no_rank() -> tl.tensor:
    """Return what is below every rank."""
    return tl.full((), -(2**63), tl.int64)


@triton.jit
def ranks(y, index) -> tl.tensor:
    """Return the ranks of float values ``y``, NaN highest, at ``index`` below 2**31."""
    y = y.to(tl.float32)
    # -0.0 equals 0.0
    bits = tl.where(y == 0.0, 0.0, y).to(tl.int32, bitcast=True)
    # negative floats order the other way round than their bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(y != y, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def store_best(y, rows, N, best_ptrs, is_token, BEST: tl.constexpr) -> None:
    """Store the BEST highest ranks of each line of y [BLOCK_M, BLOCK_N], at ``rows`` below N."""
    ranked = tl.where((rows < N)[None, :], ranks(y, rows[None, :]), _no_rank())
    for i in range(BEST):
        best = tl.max(ranked, axis=1)
        tl.store(best_ptrs + i, best, mask=is_token)
        ranked = tl.where(ranked == best[:, None], _no_rank(), ranked)


@triton.jit
def _merge_best_kernel(
    # tensors: best [M, C] int64; values [M, BEST]; indices [M, BEST] int64
    best_ptr, values_ptr, indices_ptr,
    # sizes
    C,
    # compile-time
    DEPENDENT: tl.constexpr, BEST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    # no two ranks are equal: the next one is the highest below the last
    last = tl.full((), 2**63 - 1, tl.int64)
    for i in range(BEST):
        highest = tl.full((BLOCK_C,), -(2**63), tl.int64)
        for start in range(0, C, BLOCK_C):
            rank = tl.load(
                best_ptr + row * C + start + cols, mask=start + cols < C, other=_no_rank()
            )  # [BLOCK_C]
            highest = tl.maximum(highest, tl.where(rank < last, rank, _no_rank()))
        last = tl.max(highest, axis=0)
        ordered = (last >> 32).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        value = bits.to(tl.float32, bitcast=True)
        tl.store(values_ptr + row * BEST + i, value.to(values_ptr.dtype.element_ty))
        tl.store(indices_ptr + row * BEST + i, 0x7FFFFFFF - (last & 0x7FFFFFFF))


def launch_merge_best(best: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Map ranks [M, C] to the k highest: values [M, k] in ``dtype`` and int64 indices [M, k]."""
    M, C = best.shape
    values = torch.empty((M, k), dtype=dtype, device=best.device)
    indices = torch.empty((M, k), dtype=torch.int64, device=best.device)
    launch(_merge_best_kernel, (M,))(
        best, values, indices, C,
        BEST=k, **tiles("merge_best", C, best.device), **dependent(best.device),
    )  # fmt: skip
    return values, indices
