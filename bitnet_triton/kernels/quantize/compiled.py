"""The quantisers as code that torch.compile fuses into few passes over the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantize.reference import (
    quantize_activations_reference,
    weight_stats_reference,
)
from bitnet_triton.runtime import compile_by_kind


@compile_by_kind
def compiled_quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x [M, K] to int8 codes [M, K] and float32 scale [M, 1]."""
    codes, scale = quantize_activations_reference(x.float())
    return codes.to(torch.int8), scale


@compile_by_kind
def compiled_weight_stats(weight: Tensor) -> Tensor:
    """Map weight [N, K] to float32 [2]: the scale, and the mean that binary codes compare with."""
    return weight_stats_reference(weight.float())


@compile_by_kind
def compiled_weight_codes(weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    """Quantise weight [N, K] to int8 codes by ``stats`` [2] of ``compiled_weight_stats``."""
    # float32: beside a 16-bit tensor, PyTorch rounds a threshold without dimensions to 16 bits
    w = weight.float()
    if binary:
        return torch.where(w > stats[1], 1, -1).to(torch.int8)
    # round(w / scale) clipped to -1..1, as two comparisons; the tie at scale / 2 goes to zero
    half = 0.5 * stats[0]
    return (w > half).to(torch.int8) - (w < -half).to(torch.int8)
