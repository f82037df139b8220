"""Exact selection: the largest scores of each row, for analysis and as baselines."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class TopK(MaskMode):
    """The keys of the largest scores. All scores are computed, several times: this saves nothing.

    Attributes:
        keys: how many each query and head keeps; the earlier key where scores are equal.
    """

    keys: int

    def __post_init__(self) -> None:
        check_number("keys", self.keys, 1)

    @property
    def mask(self) -> Mask:
        """The largest scores."""
        return Mask(top_k=self.keys)


@dataclass(frozen=True)
class Threshold(MaskMode):
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
    def mask(self) -> Mask:
        """The large weights."""
        return Mask(threshold=float(self.share))
