"""How Native Sparse Attention divides a text into blocks (arXiv:2502.11089, section 3.3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class SparseBlocks:
    """Sizes and numbers of blocks; the defaults are those of the paper.

    Positions count from 0. Compression block i holds the tokens i * stride .. i * stride + block,
    selection block j the tokens j * selection .. (j + 1) * selection.

    Attributes:
        block: tokens of a compression block.
        stride: tokens from one to the next; divides ``block`` and ``selection``.
        selection: tokens of a selection block, at least ``block``.
        selected: blocks that a token reads, the forced ones among them.
        initial: the first blocks of the text, which every token reads.
        local: the latest blocks, a token's own among them, which it reads.
        window: latest keys that a token reads in the branch of the window, itself included.
    """

    block: int = 32
    stride: int = 16
    selection: int = 64
    selected: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in ("initial", "local"))
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{field.name}`: expected an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"`{field.name}`: expected at least {least}, got {value}")
        for name in ("block", "selection"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"`{name}`: expected a multiple of `stride`, {self.stride}, "
                    f"got {getattr(self, name)}"
                )
        if self.selection < self.block:
            raise ValueError(
                f"`selection`: expected at least `block`, {self.block}, got {self.selection}"
            )
        if self.initial + self.local > self.selected:
            raise ValueError(
                f"`selected`: expected at least `initial` + `local`, "
                f"{self.initial + self.local}, got {self.selected}"
            )

    def compressed(self, tokens: int) -> int:
        """Return how many compression blocks ``tokens`` tokens have."""
        return count_blocks(tokens, self.block, self.stride)

    @property
    def own_weights(self) -> tuple[int, ...]:
        """How many stride units block ``ratio * j + m`` shares with selection block j, by m."""
        units, ratio = self.block // self.stride, self.ratio
        return tuple(min(units, ratio - m) for m in range(ratio))

    @property
    def next_weights(self) -> tuple[int, ...]:
        """How many of them it shares with selection block j + 1."""
        units = self.block // self.stride
        return tuple(units - own for own in self.own_weights)

    @property
    def ratio(self) -> int:
        """How many compression blocks begin in a selection block."""
        return self.selection // self.stride


def count_blocks(tokens: int, block: int, stride: int) -> int:
    """Return how many blocks of ``block`` tokens, ``stride`` apart, ``tokens`` tokens have."""
    return max(tokens - block + stride, 0) // stride
