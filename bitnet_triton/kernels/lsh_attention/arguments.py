"""A call of bucket_attention: what the launchers of every backend read beside qk and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class BucketCall:
    """Everything but qk and v.

    In each round tokens are sorted by bucket, then by position. What a token sees of a round is a
    run of that order, whatever the pattern.

    Attributes:
        order: int32 [R B H T], the token at each place of the order.
        rank: int32 [R B H T], the place of each token.
        low: int32 [R B H T], the first place that a token sees; T for padding.
        ahead: int32 [R B H T], the last one that it sees if it is not causal; -1 for padding.
        causal: no token sees a place behind its own.
        scale: multiplies the scores.
    """

    order: Tensor
    rank: Tensor
    low: Tensor
    ahead: Tensor
    causal: bool
    scale: float

    @property
    def high(self) -> Tensor:
        """The last place that a token sees, [R B H T]."""
        return self.rank if self.causal else self.ahead

    @property
    def first(self) -> Tensor:
        """The first place that sees a token, [R B H T]; the last one is ``ahead``."""
        return self.rank if self.causal else self.low

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.order, self.rank, self.low, self.ahead]

    @classmethod
    def build(
        cls, order: Tensor, rank: Tensor, low: Tensor, ahead: Tensor, causal: bool, scale: float
    ) -> BucketCall:
        """Put together what ``flatten`` took apart."""
        return cls(order, rank, low, ahead, causal, scale)

    def flatten(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, float]:
        """Take it apart into the arguments of ``build``."""
        return self.order, self.rank, self.low, self.ahead, self.causal, self.scale


class Directions(NamedTuple):
    """What a bucket is chosen from: the direction that a vector is most alike.

    Attributes:
        rows: [heads or 1, R W, D] of any float dtype, those of round r from r W on; each round has
            those of one factor, then those of another.
        widths: how many a factor has, one number or two; W is their sum.
        is_signed: whether the opposite of each direction is one as well, whose number is larger by
            as many as there are.
    """

    rows: Tensor
    widths: tuple[int, ...]
    is_signed: bool
