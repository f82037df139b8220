"""Exact selection by weight: what counts in each row, for analysis and as a baseline."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served, masked_attention
from bitnet_triton.attention.mode import Mode, StepLayer
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.cache import Memory
from bitnet_triton.kernels import exact_attention


@dataclass(frozen=True)
class Threshold(Mode):
    """The keys of large weights. All scores are computed, several times: this saves nothing.

    Attributes:
        share: least weight, as a share of the largest one of the row; the rest is renormalised.
    """

    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, (int, float)) or isinstance(self.share, bool):
            got = type(self.share).__name__
            raise TypeError(f"`attention`: 'share': expected a number, got {got}")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"`attention`: 'share': expected more than 0, up to 1, got {self.share}"
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        attend = functools.partial(exact_attention, threshold=float(self.share))
        return masked_attention(q, k, v, CAUSAL, context, attend)[0]

    def step(self, memory: Memory, layer: StepLayer) -> str:
        """Say that there is none: scores are gone over several times."""
        return "exact selection is for analysis, and has no kernel for decoding"
