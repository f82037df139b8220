"""A prompt compressed by what its last tokens look at (SnapKV, arXiv:2404.14469).

The last queries of a prompt show which of its tokens the answer will need. Their probabilities are
summed, smoothed over neighbours, so that a token brings its context along, and summed over the
query heads that share a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.cache.evicting import EvictingLayer, check_budget
from bitnet_triton.cache.memory import Attended, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole
from bitnet_triton.kernels import attention_mass


@dataclass(frozen=True)
class SnapKV(MemoryKind):
    """What the last tokens of a prompt look at, and these themselves; generated tokens are added.

    Attributes:
        budget: rows that each head keeps of a prompt, a number, or a share of its tokens.
        window: last tokens of a prompt, by which the others are chosen; a call of no more than so
            many is not compressed.
        kernel: tokens over which scores are averaged, an odd number.
    """

    evicts: ClassVar[bool] = True

    budget: float = 0.2
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_whole("window", self.window, 1)
        check_whole("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"`cache`: 'kernel': expected an odd number, got {self.kernel}")

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return SnapKVLayer(self.budget, self.window, self.kernel)


class SnapKVLayer(EvictingLayer):
    """Keys and values of a prompt, as many as the budget says, and of what was generated."""

    def __init__(self, budget: float, window: int, kernel: int) -> None:
        super().__init__(budget)
        self.least = self.window = window
        self.kernel = kernel

    def score(self, attended: Attended | None) -> Tensor:
        """Return what the window gives to each slot, smoothed."""
        assert attended is not None
        q, k = attended.q[:, -self.window :], attended.k
        mass = attention_mass(
            q, k, attended.lse[:, :, -self.window :].contiguous(), scale=attended.scale,
            softcap=attended.softcap, leftpad_k=self.held_padding(),
        )  # fmt: skip
        mass = mass.unflatten(1, (k.shape[2], -1)).sum(2)  # [B Hk Tk]
        # the window itself stays, and lends nothing to those before it
        before = mass[..., : -self.window]
        smooth = F.avg_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(smooth, (0, self.window), value=float("inf"))

    def latest(self, limits: Tensor) -> Tensor:
        """Return how many of the latest tokens stay: the window."""
        return limits.clamp_max(self.window)
