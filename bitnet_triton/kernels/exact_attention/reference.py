"""Which keys a row takes, in plain PyTorch: for ``select`` of ``attention_reference``."""

from __future__ import annotations

import torch
from torch import Tensor


def select_reference(
    scores: Tensor, visible: Tensor, *, top_k: int | None = None, threshold: float | None = None
) -> Tensor:
    """Return which of the ``visible`` pairs [B H Tq Tk] rows take by their ``scores``.

    A weight is compared with the largest one of its row: ``exp(s - max s) >= threshold``. Of equal
    scores the earlier key comes first.
    """
    scores = scores.masked_fill(~visible, float("-inf"))
    if threshold is not None:
        largest = scores.amax(-1, keepdim=True)
        visible = visible & ((scores - largest).exp() >= threshold)
    if top_k is not None and top_k < scores.shape[-1]:
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :top_k]
        visible = visible & torch.zeros_like(visible).scatter_(-1, order, True)
    return visible
