"""The cross entropy of a linear's outputs in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100
) -> Tensor:
    """Map ``hidden`` [N D], ``weight`` [V D] and ``labels`` [N] to losses [N].

    ``loss = log sum_v exp(h w_v) - h w_label``; 0 where there is no label.
    """
    logits = hidden @ weight.t()
    has_label = labels != ignore_index
    target = logits.gather(-1, labels.where(has_label, 0)[:, None])[:, 0]
    return (logits.logsumexp(-1) - target).where(has_label, 0)
