"""A linear with int8 weights in plain PyTorch, its activations rounded to fifteen bits."""

from __future__ import annotations

import torch
from torch import Tensor

# what two int8 planes hold: 127 * 128 + 63
STEPS = 16319


def split_activations_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``x`` [M, K] to whole steps, 16319 to the largest magnitude of a row.

    Returns:
        high and low [M, K], integers in the dtype of ``x`` with 128 high + low steps in each
        element, low between -64 and 64; the step [M].
    """
    largest = x.abs().amax(-1).clamp_min(1e-30)
    # by a tensor: a number PyTorch turns into its reciprocal on a GPU, and codes beside a tie flip
    step = largest / torch.full_like(largest, STEPS)
    code = (x / step[:, None]).round()
    high = (code / 128).round()
    return high, code - 128 * high, step


def int8_product_reference(
    high: Tensor, low: Tensor, step: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply what ``split_activations_reference`` returns by ``codes`` [N, K] and its scales."""
    y = (128 * (high @ codes.t()) + low @ codes.t()) * (step[:, None] * scale)
    return y if bias is None else y + bias


def int8_linear_reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply ``x`` [M, K], split, by ``codes`` [N, K] times ``scale`` [N], transposed."""
    return int8_product_reference(*split_activations_reference(x), codes, scale, bias)
