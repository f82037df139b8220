"""Merge attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge results for disjoint sets of keys: split keys, sinks and a window, a shared prefix.

    ``lse = logsumexp_p lse_p``, ``out = sum_p exp(lse_p - lse) out_p`` (arXiv:2205.14135, section
    3.1). The order and the grouping of the parts do not matter. Differentiable in all arguments.

    Args:
        outs: a tensor for each part, [B Tq H Dv], or [sum Tq, H, Dv] where sequences are packed.
        lses: for each part float32 [B H Tq], or [H, sum Tq]; -inf where a query saw nothing.

    Returns:
        The merged ``out`` in the dtype of the parts, zeros where no part saw a key, and ``lse``.

    Raises:
        ValueError: there is no part, their number differs, or shapes do not fit.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"`outs`: expected as many parts as `lses`, at least one, got {len(outs)} and "
            f"{len(lses)}"
        )
    for out, lse in zip(outs, lses):
        if out.shape != outs[0].shape:
            raise ValueError(f"`outs`: expected equal shapes, got {[list(o.shape) for o in outs]}")
        if lse.transpose(-1, -2).shape != out.shape[:-1]:
            raise ValueError(
                f"`lses`: expected {list(out.transpose(-2, -3).shape[:-1])}, got {list(lse.shape)}"
            )
    stacked = torch.stack(list(lses))  # [P B H Tq]
    top = stacked.detach().amax(0)
    # a query that saw nothing has no finite pivot; 0 keeps NaN out of it and of its gradient
    empty = top == float("-inf")
    top = top.masked_fill(empty, 0.0)
    shares = torch.exp(stacked - top)
    total = shares.sum(0).masked_fill(empty, 1.0)
    weights = (shares / total).transpose(-1, -2)[..., None]  # [P B Tq H 1]
    out = sum(
        (w * o.to(w.dtype) for w, o in zip(weights, outs)), start=torch.zeros_like(weights[0])
    )
    lse = (top + total.log()).masked_fill(empty, float("-inf"))
    return out.to(outs[0].dtype), lse
