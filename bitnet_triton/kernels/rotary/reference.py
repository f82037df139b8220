"""Rotary position embedding (arXiv:2104.09864, eq. 34) in plain PyTorch, halves as in GPT-NeoX.

Pairs are (x[i], x[i + D / 2]), as in transformers' Llama and BitNet; the paper's are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [B, T, H, D] by angles whose cosines and sines are [B or 1, T, D]."""
    first, second = x.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(2) + crossed * sin.unsqueeze(2)


def rotary_backward_reference(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the transpose of ``rotary_reference``, as its derivative does."""
    first, second = (dy * sin.unsqueeze(2)).chunk(2, dim=-1)
    return dy * cos.unsqueeze(2) + torch.cat((second, -first), dim=-1)


def token_rows(table: Tensor, positions: Tensor, T: int) -> Tensor:
    """Return the rows [B, T, D] of ``table`` [P, D] for T tokens from ``positions`` [B] on.

    Padding stands before position 0 and gets its row; beyond the table everything is NaN.
    """
    rows = (positions.long()[:, None] + torch.arange(T, device=positions.device)).clamp_min(0)
    beyond = rows >= table.shape[0]
    return table[rows.clamp_max(table.shape[0] - 1)].masked_fill(beyond[..., None], float("nan"))


def store_reference(cache: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write ``values`` [B, T, Hk, D] to ``cache`` [B, C, Hk, D] from ``slots`` [B] on, in place."""
    T = values.shape[1]
    places = slots.long()[:, None] + torch.arange(T, device=slots.device)
    row, token = torch.nonzero((places >= 0) & (places < cache.shape[1]), as_tuple=True)
    cache[row, places[row, token]] = values[row, token]
