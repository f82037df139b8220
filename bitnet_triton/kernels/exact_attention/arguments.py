"""A call of exact_attention: one of flash_attention, and what is selected."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call

_NONE = -1  # stands for None


@dataclass(frozen=True)
class ExactCall:
    """Everything but q, k and v.

    Attributes:
        call: what ``flash_attention`` would take; scores decide among what its mask shows.
        top_k: each row takes so many keys; None: all.
        threshold: each row takes weights of at least this share of its largest one; None: all.
    """

    call: Call
    top_k: int | None = None
    threshold: float | None = None

    @classmethod
    def build(
        cls,
        tensors: list[Tensor | None],
        numbers: list[int],
        dilation: list[int],
        tokens: list[int] | None,
        factors: list[float],
        top_k: int,
        threshold: float,
    ) -> ExactCall:
        """Put together what ``flatten`` took apart."""
        call = Call.build(tensors, numbers, dilation, tokens, factors)
        return cls(call, None if top_k == _NONE else top_k, threshold or None)

    def flatten(self) -> tuple:
        """Take it apart into the arguments of ``build``."""
        top_k = _NONE if self.top_k is None else self.top_k
        return (*self.call.flatten(), top_k, self.threshold or 0.0)
