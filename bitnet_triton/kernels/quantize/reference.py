"""The quantisers of BitNet in plain PyTorch: the oracle of the tests.

Weights: arXiv:2402.17764, eq. 1-3 (ternary) and arXiv:2310.11453, eq. 1-3 (binary). Activations:
arXiv:2310.11453, eq. 4, per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5
INT8_MAX = 127


def quantize_activations_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map ``x`` [..., K] to codes in -128..127 and a scale [..., 1] with x about codes * scale."""
    gamma = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
    codes = (x * (INT8_MAX / gamma)).round().clamp(-128, INT8_MAX)
    # by a tensor: a number PyTorch turns into its reciprocal on a GPU, off by the last bit
    return codes, gamma / torch.full_like(gamma, INT8_MAX)


def weight_stats_reference(weight: Tensor) -> Tensor:
    """Map ``weight`` [N, K] to [2]: its scale beta, and the mean that binary codes compare with."""
    return torch.stack([weight.abs().mean().clamp_min(SMALLEST_SCALE), weight.mean()])


def weight_codes_reference(weight: Tensor, stats: Tensor, *, levels: str) -> Tensor:
    """Map ``weight`` [N, K] to codes by its ``stats`` [2]."""
    beta, mean = stats.unbind()
    if levels == "binary":
        # sign(0) = -1, as the paper defines it: a third value would not fit in one bit
        return torch.where(weight > mean, 1.0, -1.0).to(weight)
    return (weight / beta).round().clamp(-1, 1)


def quantize_weight_reference(weight: Tensor, *, levels: str) -> tuple[Tensor, Tensor]:
    """Map ``weight`` [N, K] to codes and one scale [] with weight about codes * scale."""
    stats = weight_stats_reference(weight)
    return weight_codes_reference(weight, stats, levels=levels), stats[0]
