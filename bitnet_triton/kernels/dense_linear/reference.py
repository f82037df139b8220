"""A linear with a dense weight in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def dense_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply ``x`` [M, K] by ``weight`` [N, K], transposed."""
    y = x @ weight.t()
    return y if bias is None else y + bias
