"""A prompt compressed by what queries to come are expected to give (arXiv:2510.00636).

Queries before their rotation are about normally distributed; mean and covariance of those of the
prompt stand for those to come, which will be turned by later positions. What such a query gives to
a key has a closed form, ``exp(mean k + k covariance k / 2)`` with scaled keys; it is weighed by the
length of the value that it would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.evicting import EvictingLayer, check_budget
from bitnet_triton.cache.memory import Attended, Call, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole


@dataclass(frozen=True)
class ExpectedAttention(MemoryKind):
    """What queries to come will look at, as far as those of a prompt tell; the first tokens stay.

    Attributes:
        budget: rows that each head keeps of a prompt, a number, or a share of its tokens.
        future: positions behind a prompt for which queries are expected.
        sinks: first tokens, which stay, and whose queries say nothing about later ones.
        least: a call of no more tokens is not compressed: they say too little.
        covariance: whether queries are taken to scatter.
    """

    evicts: ClassVar[bool] = True

    budget: float = 0.2
    future: int = 512
    sinks: int = 4
    least: int = 64
    covariance: bool = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_whole("future", self.future, 1)
        check_whole("sinks", self.sinks, 0)
        check_whole("least", self.least, self.sinks + 1)
        if not isinstance(self.covariance, bool):
            got = type(self.covariance).__name__
            raise TypeError(f"`cache`: 'covariance': expected true or false, got {got}")

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return ExpectedAttentionLayer(self)


class ExpectedAttentionLayer(EvictingLayer):
    """Keys and values of a prompt, as many as the budget says, and of what was generated."""

    def __init__(self, kind: ExpectedAttention) -> None:
        super().__init__(kind.budget)
        self.kind, self.least, self.first = kind, kind.least, kind.sinks
        self._frequencies: Tensor | None = None

    def begin(self, call: Call) -> None:
        """Note by what angles positions are turned."""
        super().begin(call)
        self._frequencies = call.frequencies

    def score(self, attended: Attended | None) -> Tensor:
        """Return what a query to come is expected to give to each slot, times its value's length.

        Raises:
            ValueError: the model does not tell how it turns positions, or turns rows differently.
        """
        assert attended is not None
        assert self.values is not None
        k = attended.k.transpose(1, 2).float()  # [B Hk T D]
        v = self.values[:, :, : k.shape[2]].float()
        mean, covariance = self._queries_to_come(attended)
        Hk = k.shape[1]
        mean = mean.unflatten(1, (Hk, -1)) * attended.scale  # [B Hk G D]
        scores = torch.einsum("bhgd,bhtd->bhgt", mean, k)
        if covariance is not None:
            covariance = covariance.unflatten(1, (Hk, -1)) * (attended.scale**2 / 2)
            for g in range(scores.shape[2]):  # one after another: keys as wide as they are here
                scores[:, :, g] += ((k @ covariance[:, :, g]) * k).sum(-1)
        empty = self.held_padding()
        if empty is not None:
            is_empty = torch.arange(k.shape[2], device=k.device) < empty[:, None]  # [B T]
            scores = scores.masked_fill(is_empty[:, None, None], float("-inf"))
        # a row that is all padding has no weights
        weights = scores.softmax(-1).nan_to_num(0.0).mean(2)
        return weights * v.norm(dim=-1)

    def _queries_to_come(self, attended: Attended) -> tuple[Tensor, Tensor | None]:
        """Return mean [B H D] and covariance [B H D D] of queries at the positions to come."""
        cos, sin = self._angles(attended)
        q = attended.q.float()
        B, T = q.shape[:2]
        scale = cos[..., :1].square() + sin[..., :1].square()  # of the rotary embedding, squared
        turned = _turn(q.transpose(1, 2), cos[:, None], -sin[:, None]) / scale[:, None]
        is_one = self._own(B, T, q.device)[:, None, :, None].float()  # [B 1 T 1]
        count = is_one.sum(2).clamp_min(1)
        mean = (turned * is_one).sum(2) / count  # [B H D]
        covariance = None
        if self.kind.covariance:
            apart = (turned - mean[:, :, None]) * is_one
            covariance = apart.transpose(2, 3) @ apart / count[..., None]
        rotation = self._mean_rotation(cos[:, -1], sin[:, -1])[:, None]  # [B 1 D D]
        mean = (rotation @ mean[..., None])[..., 0]
        if covariance is not None:
            covariance = rotation @ covariance @ rotation.transpose(2, 3)
        return mean, covariance

    def _angles(self, attended: Attended) -> tuple[Tensor, Tensor]:
        if attended.rotary is None or self._frequencies is None or self._frequencies.ndim != 1:
            raise ValueError(
                "`cache`: 'expected_attention' expects queries at later positions: it needs a "
                "model that tells the positions and the frequencies of its rotary embedding, the "
                "same for all rows"
            )
        cos, sin = attended.rotary
        return cos.float(), sin.float()

    def _own(self, B: int, T: int, device: torch.device) -> Tensor:
        """Return which of the latest T tokens are neither padding nor sinks, bool [B T]."""
        end = self.columns - self._generated(self.columns)
        column = torch.arange(end - T, end)
        left = torch.zeros(B, dtype=torch.long) if self._left is None else self._left
        return (column >= left[:, None] + self.kind.sinks).to(device)

    def _mean_rotation(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the mean of the rotations behind a token that was turned by cos and sin [B D]."""
        assert self._frequencies is not None
        frequencies = self._frequencies.to(cos.device, torch.float64)
        # those of the positions that follow, from the last token on
        steps = torch.arange(1, self.kind.future + 1, device=cos.device, dtype=torch.float64)
        angles = steps[:, None] * frequencies
        further = [f(angles).mean(0).repeat(2).float() for f in (torch.cos, torch.sin)]
        c = cos * further[0] - sin * further[1]
        s = sin * further[0] + cos * further[1]
        D = c.shape[-1]
        eye = torch.eye(D, device=cos.device)
        # rows of the matrix that maps x to x * c + rotate_half(x) * s
        half = _rotate_half(eye).transpose(0, 1)
        return eye * c[:, :, None] + half * s[:, :, None]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _rotate_half(x) * sin
