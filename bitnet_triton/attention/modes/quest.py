"""Pages chosen by bounds of their keys: Quest (arXiv:2406.10774)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitnet_triton.attention.blocks import (
    BlockMode,
    Rows,
    check_blocks,
    choose_blocks,
    launched_choice,
    units_of,
)
from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import StepLayer, StepTensors
from bitnet_triton.kernels import Units


@dataclass(frozen=True)
class Quest(BlockMode):
    """The pages in which a key could be that the queries like best.

    Nothing is trained and nothing is dropped: the largest and the smallest entry of each channel in
    a page bound the product with any of its keys. A step reads the bounds of all pages and the keys
    of those that it chooses. The page of the token itself is always read.

    Attributes:
        page: tokens of a page.
        budget: tokens that each token reads, a multiple of ``page``.
        initial: first pages that are read always.
        local: last pages that are read always, the one that is being filled included.
        per_head: choose for each head of queries, as the paper does; else once for those that share
            keys, by the sum of their bounds, which reads less.
        dense_below: tokens of a text that read everything.
    """

    page: int = 16
    budget: int = 1024
    initial: int = 0
    local: int = 1
    per_head: bool = False
    dense_below: int = 0

    def __post_init__(self) -> None:
        check_number("page", self.page, 1)
        check_number("budget", self.budget, 1)
        if self.budget % self.page:
            raise ValueError(
                f"`attention`: 'budget': expected a multiple of 'page'={self.page}, "
                f"got {self.budget}"
            )
        if not isinstance(self.per_head, bool):
            raise TypeError(
                f"`attention`: 'per_head': expected a bool, got {type(self.per_head).__name__}"
            )
        check_blocks(self, self.page)

    @property
    def selected(self) -> int:
        """How many pages a token reads."""
        return self.budget // self.page

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.page

    @property
    def _units(self) -> Units:
        return Units("bounds", self.page, self.page)

    @property
    def units(self) -> tuple[Units, ...]:
        """The bounds of pages."""
        return (self._units,)

    def choose(self, q: Tensor, k: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        """Return the pages of each token, int32 [B Tq Hk or H, S]."""
        sets = q.shape[2] if self.per_head else k.shape[2]
        keys = units_of(k, self._units, rows, context)
        return choose_blocks(q, keys, rows, sets=sets, **self._settings)

    def step_choice(
        self, memory: Any, layer: StepLayer
    ) -> Callable[[Tensor, StepTensors], Tensor] | str:
        """Return the launches that choose."""
        if self.per_head:
            return "heads that choose apart have no kernel for decoding"
        return launched_choice(memory, self._units, layer.kv_heads, self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "block": self.page, "selected": self.selected, "initial": self.initial,
            "local": self.local, "units": self._units,
        }  # fmt: skip
