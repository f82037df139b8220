"""Exact selection: the largest scores of each row, for analysis and as a baseline."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served, masked_attention
from bitnet_triton.attention.mode import Mode, StepLayer
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.cache import Memory
from bitnet_triton.kernels import exact_attention


@dataclass(frozen=True)
class TopK(Mode):
    """The keys of the largest scores. All scores are computed, several times: this saves nothing.

    Attributes:
        keys: how many each query and head keeps; the earlier key where scores are equal.
    """

    keys: int

    def __post_init__(self) -> None:
        check_number("keys", self.keys, 1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        attend = functools.partial(exact_attention, top_k=self.keys)
        return masked_attention(q, k, v, CAUSAL, context, attend)[0]

    def step(self, memory: Memory, layer: StepLayer) -> str:
        """Say that there is none: scores are gone over several times."""
        return "exact selection is for analysis, and has no kernel for decoding"
