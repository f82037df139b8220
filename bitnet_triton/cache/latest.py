"""The first tokens and the latest ones, whatever they hold: StreamingLLM's choice of rows.

(arXiv:2309.17453.) Positions stay those of the text; attention "streaming" counts them anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.evicting import EvictingLayer, check_budget
from bitnet_triton.cache.memory import Attended, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole


@dataclass(frozen=True)
class Latest(MemoryKind):
    """The first tokens and the latest ones.

    Attributes:
        budget: rows that each head keeps, a number, or a share of the prompt's tokens.
        sinks: first tokens of the text among them.
    """

    evicts: ClassVar[bool] = True

    budget: float = 0.2
    sinks: int = 4

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_whole("sinks", self.sinks, 0)

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return LatestLayer(self.budget, self.sinks)


class LatestLayer(EvictingLayer):
    """Keys and values of the first tokens and the latest ones, up to a budget."""

    is_continuous: ClassVar[bool] = True

    def __init__(self, budget: float, sinks: int) -> None:
        super().__init__(budget)
        self.first = sinks

    def score(self, attended: Attended | None) -> Tensor:
        """Return the slots themselves: the later, the better."""
        assert self.keys is not None
        B, Hk, held, _ = self.keys.shape
        return torch.arange(held, device=self.keys.device).float().expand(B, Hk, held)
