"""Modes by brute force: the pairs that a mode shows, and attention over them in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def pairs(T: int, sees, left: int = 0) -> Tensor:
    """Return bool [T T]: causal pairs of positions for which ``sees(i, j)``, padding left out."""
    seen = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T - left):
        for j in range(i + 1):
            seen[left + i, left + j] = bool(sees(i, j))
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, is_visible: Tensor, scale: float) -> Tensor:
    """Attend in float64, with q [B Tq H D], k and v [B Tk Hk D]; rows without a key give zeros."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    is_visible = is_visible.expand(scores.shape)
    weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.fixture
def visible_pairs():
    """``pairs``."""
    return pairs


@pytest.fixture
def formula():
    """``attention``."""
    return attention


@pytest.fixture
def heads():
    """A function that draws q [B Tq H D], k and v [B Tk Hk D]."""

    def draw(Tq: int, Tk: int | None = None, B: int = 2, H: int = 4, Hk: int = 2, D: int = 16):
        Tk = Tq if Tk is None else Tk
        return torch.randn(B, Tq, H, D), torch.randn(B, Tk, Hk, D), torch.randn(B, Tk, Hk, D)

    return draw


@pytest.fixture
def close():
    """A function that compares a float32 result with one in float64."""

    def check(value: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)

    return check
