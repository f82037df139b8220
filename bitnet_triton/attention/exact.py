"""Exact selection: the largest scores of each row, for analysis and as baselines."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served, masked_attention
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.kernels import exact_attention


@dataclass(frozen=True)
class TopK:
    """The keys of the largest scores. All scores are computed, several times: this saves nothing.

    Attributes:
        keys: how many each query and head keeps; the earlier key where scores are equal.
    """

    keys: int

    def __post_init__(self) -> None:
        check_number("keys", self.keys, 1)

    @property
    def kept(self) -> None:
        """A cache has to keep everything."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        attend = functools.partial(exact_attention, top_k=self.keys)
        return masked_attention(q, k, v, CAUSAL, context, attend)[0]


@dataclass(frozen=True)
class Threshold:
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

    @property
    def kept(self) -> None:
        """A cache has to keep everything."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        attend = functools.partial(exact_attention, threshold=float(self.share))
        return masked_attention(q, k, v, CAUSAL, context, attend)[0]
