"""AttentionPlan: which mode a model uses; plain data in, plain data out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitnet_triton.attention.registry import MODES, parse_mode


@dataclass(frozen=True)
class AttentionPlan:
    """One mode for every layer and phase.

    Attributes:
        mode: a frozen dataclass out of ``registry.MODES``.
    """

    mode: Any

    @classmethod
    def from_config(cls, value: str | Mapping[str, Any]) -> AttentionPlan:
        """Build a plan from ``config.attention``.

        Args:
            value: a mode's name, or a mapping with ``mode`` and its settings.

        Raises:
            TypeError: ``value`` is neither.
            ValueError: the mode or a setting is unknown.
        """
        return cls(parse_mode(value))

    def to_config(self) -> dict[str, Any]:
        """Return the plan as plain data that ``from_config`` reads."""
        name = next(name for name, mode in MODES.items() if isinstance(self.mode, mode))
        return {"mode": name, **dataclasses.asdict(self.mode)}
