"""AttentionPlan: which mode each layer uses in each phase; plain data in, plain data out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_triton.attention.context import PHASES
from bitnet_triton.attention.registry import MODES, parse_mode


@dataclass(frozen=True)
class AttentionPlan:
    """The modes of a model.

    Attributes:
        prefill: one mode for all layers, or one for each.
        decode: the same, for steps of one token.
    """

    prefill: tuple[Any, ...]
    decode: tuple[Any, ...]

    @classmethod
    def from_config(cls, value: str | Mapping[str, Any]) -> AttentionPlan:
        """Build a plan from ``config.attention``.

        Args:
            value: a mode, as its name or as a mapping with ``mode`` and its settings; or a mapping
                with ``prefill`` and ``decode``, each of them a mode or a list with a mode a layer.

        Raises:
            TypeError: ``value`` is none of them.
            ValueError: a mode or a setting is unknown; a phase is missing or unknown.
        """
        if not isinstance(value, Mapping) or set(PHASES).isdisjoint(value):
            mode = parse_mode(value)
            return cls((mode,), (mode,))
        if set(value) != set(PHASES):
            got = ", ".join(map(repr, value))
            raise ValueError(f"`attention`: expected the phases 'prefill' and 'decode', got {got}")
        return cls(*(_parse_layers(value[phase]) for phase in PHASES))

    def to_config(self) -> dict[str, Any]:
        """Return the plan as plain data that ``from_config`` reads."""
        prefill, decode = _to_data(self.prefill), _to_data(self.decode)
        if len(self.prefill) == 1 and prefill == decode:
            return prefill
        return {"prefill": prefill, "decode": decode}

    def mode(self, layer: int, phase: str) -> Any:
        """Return the mode of a layer in a phase."""
        modes = self.prefill if phase == "prefill" else self.decode
        return modes[0] if len(modes) == 1 else modes[layer]

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless the plan fits a model with that many layers."""
        for phase in PHASES:
            got = len(getattr(self, phase))
            if got not in (1, layers):
                raise ValueError(
                    f"`attention`: expected one mode or {layers}, one a layer, got {got} for "
                    f"{phase!r}"
                )


def _parse_layers(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(parse_mode, value))
    return (parse_mode(value),)


def _to_data(modes: tuple[Any, ...]) -> Any:
    data = [
        {
            "mode": next(name for name, kind in MODES.items() if type(mode) is kind),
            **dataclasses.asdict(mode),
        }
        for mode in modes
    ]
    return data[0] if len(data) == 1 else data
