"""The trainable ternary linear in plain PyTorch: the oracle of the tests and the honest slow path.

y = (sum over k of a * w) * (gamma / 127) * beta + bias (arXiv:2310.11453, eq. 11), with the codes
a of the activations and w of the weights, and gradients straight through both quantisers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantize.reference import (
    quantize_activations_reference,
    quantize_weight_reference,
)


def _straight_through(value: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Forward codes * scale, backward the identity on ``value``."""
    return value + (codes * scale - value).detach()


def bit_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, levels: str = "ternary"
) -> Tensor:
    """Multiply ``x`` [M, K] by ``weight`` [N, K], both quantised on the way, straight-through."""
    x_codes, x_scale = quantize_activations_reference(x)
    w_codes, w_scale = quantize_weight_reference(weight, levels=levels)
    x_q = _straight_through(x, x_codes, x_scale)
    w_q = _straight_through(weight, w_codes, w_scale)
    y = torch.einsum("mk,nk->mn", x_q, w_q)
    return y if bias is None else y + bias
