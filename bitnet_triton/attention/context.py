"""What an attention mode knows besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class AttentionContext:
    """The only inputs of a mode beside q, k and v, so that every mode fits into any layer.

    Attributes:
        layer: index of the layer.
        phase: "prefill" for many query tokens, "decode" for one.
        mask: bool [B 1 Tq Tk], True where a query may read a key; None: causal, without padding.
        scale: multiplies the scores before the softmax.
        dropout: probability of dropping a weight, 0 outside of training.
    """

    layer: int
    phase: str
    mask: Tensor | None
    scale: float
    dropout: float = 0.0
