"""Rotation by Sylvester's matrix, normalised, in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated_block(D: int) -> int:
    """Return how many neighbours are rotated together: the largest power of two that divides D."""
    return D & -D


def hadamard_reference(x: Tensor) -> Tensor:
    """Rotate the last dimension of ``x`` [..., D], in blocks of a power of two.

    ``H_1 = 1``, ``H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)``.
    """
    n = rotated_block(x.shape[-1])
    y = x.unflatten(-1, (-1, n))
    half = 1
    while half < n:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return (y * n**-0.5).flatten(-2)
