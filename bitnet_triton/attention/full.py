"""Full causal attention: every query reads every key up to its own position."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """Full causal attention, computed by the ``attn_implementation`` of transformers."""
