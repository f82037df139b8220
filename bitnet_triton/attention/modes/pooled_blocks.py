"""Blocks chosen by their pooled keys: InfLLM-v2 (arXiv:2509.24663), MoBA (arXiv:2502.13189)."""

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
class PooledBlocks(BlockMode):
    """The blocks whose mean keys the queries of a group like best, and those that are near.

    No parameter is new: a dense checkpoint runs with it as it is. The score of a block is the
    product of the sum of the group's queries with the mean of the block's rotated keys, or the
    largest one with the means of several windows (InfLLM-v2: ``window=32, stride=16``).

    Attributes:
        block: tokens of a block.
        selected: blocks that each token reads, those that are read always included.
        initial: first blocks that are read always.
        local: last blocks that are read always, the own one included.
        window: tokens of a mean. Default: the block.
        stride: tokens from one mean to the next, a divisor of both. Default: ``window``.
        dense_below: tokens of a text that read everything.
    """

    block: int = 64
    selected: int = 16
    initial: int = 1
    local: int = 1
    window: int | None = None
    stride: int | None = None
    dense_below: int = 0

    def __post_init__(self) -> None:
        check_blocks(self, self.block)
        for name in ("window", "stride"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1)
        units = self._units
        if self.block % units.stride:
            raise ValueError(
                f"`attention`: 'stride': expected a divisor of 'block'={self.block}, "
                f"got {units.stride}"
            )

    @property
    def _units(self) -> Units:
        window = self.block if self.window is None else self.window
        stride = window if self.stride is None else self.stride
        if window % stride:
            raise ValueError(
                f"`attention`: 'stride': expected a divisor of 'window'={window}, got {stride}"
            )
        return Units("mean", stride, window)

    @property
    def units(self) -> tuple[Units, ...]:
        """The means."""
        return (self._units,)

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.block

    def choose(self, q: Tensor, k: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        """Return the blocks of each token and head of keys, int32 [B Tq Hk S]."""
        keys = units_of(k, self._units, rows, context)
        return choose_blocks(q, keys, rows, sets=k.shape[2], **self._settings)

    def step_choice(
        self, memory: Any, layer: StepLayer
    ) -> Callable[[Tensor, StepTensors], Tensor] | str:
        """Return the launches that choose."""
        return launched_choice(memory, self._units, layer.kv_heads, self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "block": self.block, "selected": self.selected, "initial": self.initial,
            "local": self.local, "units": self._units,
        }  # fmt: skip
