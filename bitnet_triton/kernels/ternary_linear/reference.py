"""The ternary linear in plain PyTorch: the oracle of the tests and the honest slow path.

y = (sum over k of a * w) * (gamma / 127) * beta + bias (arXiv:2310.11453, eq. 11), with the codes
a of the activations and w of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantize.reference import quantize_activations_reference


def _straight_through(value: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Forward codes * scale, backward the identity on ``value``."""
    return value + (codes * scale - value).detach()


def ternary_linear_reference(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply quantised ``x`` [M, K] by ``codes`` [N, K] * ``scale``; differentiable in ``x``."""
    x_codes, x_scale = quantize_activations_reference(x)
    y = torch.einsum("mk,nk->mn", _straight_through(x, x_codes, x_scale), codes * scale)
    return y if bias is None else y + bias
