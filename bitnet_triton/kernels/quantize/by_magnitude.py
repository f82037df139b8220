"""Quantising rows of which only a part is here, by a magnitude that is told.

Plain PyTorch, a few launches: collective calls stand before and behind it, which take longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantize.reference import INT8_MAX, SMALLEST_SCALE


def quantize_by_magnitude(x: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``x`` [M, K] as ``quantize_activations`` does rows whose largest |x| is told.

    Args:
        x: [M, K], a part of the columns of some rows.
        magnitude: float32 [M, 1], the largest magnitude of each whole row.

    Returns:
        int8 codes [M, K], float32 scale [M, 1], and int32 sums of codes [M].
    """
    gamma = magnitude.clamp_min(SMALLEST_SCALE)  # NaN stays NaN
    # by tensors: a number PyTorch turns into its reciprocal on a GPU, off by the last bit
    full = torch.full_like(gamma, INT8_MAX)
    codes = (x.float() * (full / gamma)).round().clamp(-128, INT8_MAX).to(torch.int8)
    return codes, gamma / full, codes.sum(-1, dtype=torch.int32)
