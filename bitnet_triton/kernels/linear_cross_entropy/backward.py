"""Triton backward of the cross entropy: gradients in place of logits, for some of the words.

One program takes one token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _linear_cross_entropy_bwd_kernel(
    # tensors: logits [M, W]; labels [M] int64; stats [M, 2]; dlosses [M]
    logits_ptr, labels_ptr, stats_ptr, dlosses_ptr,
    # sizes: words, and the first of them
    W, first,
    # compile-time
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    # int64: row * W overflows int32 from 2**31 logits on
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * W
    label = tl.load(labels_ptr + row) - first
    pivot = tl.load(stats_ptr + row * 2)
    total = tl.load(stats_ptr + row * 2 + 1)
    dloss = tl.load(dlosses_ptr + row)
    cols = tl.arange(0, BLOCK_V)

    for start in range(0, W, BLOCK_V):
        in_row = start + cols < W
        logits = tl.load(row_ptr + start + cols, mask=in_row, other=float("-inf"))  # [BLOCK_V]
        shares = tl.exp(logits.to(tl.float32) - pivot) / total
        dlogits = tl.where(start + cols == label, shares - 1.0, shares) * dloss
        tl.store(row_ptr + start + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=in_row)


def launch_cross_entropy_bwd(
    logits: Tensor, labels: Tensor, stats: Tensor, dlosses: Tensor, first: int
) -> None:
    """Put dlogits in place of logits [M, W], those of the W words from ``first`` on.

    labels [M], stats [M, 2] and dlosses [M] are of the forward; the latter two in float32.
    """
    M, W = logits.shape
    launch(_linear_cross_entropy_bwd_kernel, (M,))(
        logits, labels, stats, dlosses,
        W, first,
        **tiles("linear_cross_entropy_bwd", M, logits.device),
    )  # fmt: skip
