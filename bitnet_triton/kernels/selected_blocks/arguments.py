"""A call of selected_block_attention: what the launchers of every backend read beside q, k, v."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SelectedCall:
    """Everything but q, k and v.

    Attributes:
        indices: int32 [B Tq Hk S], or [sum T, Hk, S], numbers of blocks; negative: none.
        block: keys of a block.
        causal: a query sees no key behind its own place.
        scale: multiplies the scores.
        cu_seqlens: int32 [B + 1], where packed sequences start; None: not packed.
        leftpad: int32 [B], the first valid key of each row, or None.
    """

    indices: Tensor
    block: int
    causal: bool
    scale: float
    cu_seqlens: Tensor | None = None
    leftpad: Tensor | None = None

    def is_empty(self, q: Tensor, k: Tensor) -> bool:
        """Tell whether there is no query, no key, no choice or no sequence."""
        no_sequence = self.cu_seqlens is not None and self.cu_seqlens.numel() == 1
        return q.numel() == 0 or k.numel() == 0 or self.indices.numel() == 0 or no_sequence

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = (self.indices, self.cu_seqlens, self.leftpad)
        return [t for t in held if t is not None]

    @classmethod
    def build(
        cls,
        indices: Tensor,
        lengths: list[Tensor | None],
        block: int,
        causal: bool,
        scale: float,
    ) -> SelectedCall:
        """Put together what ``flatten`` took apart."""
        return cls(indices, block, causal, scale, *lengths)

    def flatten(self) -> tuple[Tensor, list[Tensor | None], int, bool, float]:
        """Take it apart into the arguments of ``build``."""
        return self.indices, [self.cu_seqlens, self.leftpad], self.block, self.causal, self.scale
