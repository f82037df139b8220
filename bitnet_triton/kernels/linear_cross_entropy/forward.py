"""Triton forward of the cross entropy of some tokens, over the logits of all words.

One program takes one token. It reads its logits once for their sum of exponentials, and, where a
gradient is wanted, once more to put the gradient of its loss in their place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    # tensors: logits [M, V]; labels [M] int64; losses [M]; stats [M, 2]
    logits_ptr, labels_ptr, losses_ptr, stats_ptr,
    # sizes
    V,
    # compile-time
    WITH_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # int64: row * V overflows int32 from 2**31 logits on
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    label = tl.load(labels_ptr + row)
    target = tl.load(row_ptr + label).to(tl.float32)
    cols = tl.arange(0, BLOCK_V)

    pivot = -1.0e38  # finite: no difference of infinities
    total = 0.0
    for start in range(0, V, BLOCK_V):
        in_row = start + cols < V
        logits = tl.load(row_ptr + start + cols, mask=in_row, other=float("-inf"))  # [BLOCK_V]
        wide = logits.to(tl.float32)
        largest = tl.maximum(pivot, tl.max(wide, axis=0))
        total = total * tl.exp(pivot - largest) + tl.sum(tl.exp(wide - largest), axis=0)
        pivot = largest

    # not the difference of two logits' size: a sure token has a loss of almost nothing
    tl.store(losses_ptr + row, tl.log(total) + (pivot - target))
    tl.store(stats_ptr + row * 2, pivot)
    tl.store(stats_ptr + row * 2 + 1, total)

    if WITH_GRADIENT:
        for start in range(0, V, BLOCK_V):
            in_row = start + cols < V
            logits = tl.load(row_ptr + start + cols, mask=in_row, other=float("-inf"))  # [BLOCK_V]
            shares = tl.exp(logits.to(tl.float32) - pivot) / total
            dlogits = tl.where(start + cols == label, shares - 1.0, shares)
            tl.store(row_ptr + start + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=in_row)


def launch_cross_entropy(
    logits: Tensor, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Map logits [M, V] and labels [M] to losses [M] and stats [M, 2], both in float32.

    Stats are the largest logit and the sum of exponentials of the distances to it. With a gradient,
    that of each loss stands in ``logits`` afterwards.
    """
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    stats = torch.empty((M, 2), dtype=torch.float32, device=logits.device)
    launch(_linear_cross_entropy_fwd_kernel, (M,))(
        logits, labels, losses, stats,
        V,
        WITH_GRADIENT=with_gradient,
        **tiles("linear_cross_entropy_fwd", M, logits.device),
    )  # fmt: skip
    return losses, stats
