"""Units: what stands for a few neighbouring keys when blocks are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["token", "mean", "bounds"]


@dataclass(frozen=True)
class Units:
    """How keys are summed up for the choice of blocks.

    Unit u of a sequence covers its tokens ``u * stride .. u * stride + window - 1``, and exists
    once all of them do. Of rows of a batch and of packed sequences alike, unit u of the sequence
    whose first token stands in column c is stored in row ``c // stride + u``.

    Attributes:
        kind: "token", the tokens' own keys; "mean", of the keys of a window; "bounds", the largest
            and the smallest entry of each channel in a window.
        stride: tokens from one unit to the next.
        window: tokens of a unit, a multiple of ``stride``.
    """

    kind: Kind = "token"
    stride: int = 1
    window: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind`: expected one of {get_args(Kind)}, got {self.kind!r}")
        if self.stride < 1 or self.window < 1 or self.window % self.stride:
            raise ValueError(
                "`window`: expected a multiple of `stride`, each at least 1, got "
                f"window={self.window}, stride={self.stride}"
            )
        if self.kind == "token" and (self.stride, self.window) != (1, 1):
            raise ValueError("`stride`, `window`: expected 1 of units that are tokens")

    @property
    def before(self) -> int:
        """How many units that start in front of a block reach into it."""
        return self.window // self.stride - 1

    def width(self, D: int) -> int:
        """Return how many numbers a unit has of keys of D."""
        return 2 * D if self.kind == "bounds" else D

    def rows(self, tokens: int) -> int:
        """Return how many rows hold the units of so many columns."""
        return tokens // self.stride
