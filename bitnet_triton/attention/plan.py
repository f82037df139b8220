"""AttentionPlan: which mode each layer uses in each phase; plain data in, plain data out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_triton.attention.checks import check_known
from bitnet_triton.attention.context import PHASES
from bitnet_triton.attention.masked import Kept
from bitnet_triton.attention.registry import MODES, parse_mode
from bitnet_triton.attention.swaa import PRESETS, parse_preset


@dataclass(frozen=True)
class AttentionPlan:
    """The modes of a model.

    Attributes:
        prefill: for the tokens of a prompt: one mode for all layers, or one for each.
        decode: the same, for generated tokens.
    """

    prefill: tuple[Any, ...]
    decode: tuple[Any, ...]

    @classmethod
    def from_config(
        cls, value: str | Mapping[str, Any], layers: int | None = None
    ) -> AttentionPlan:
        """Build a plan from ``config.attention``.

        Args:
            value: a mode, as its name or as a mapping with ``mode`` and its settings; a preset, as
                its name or as a mapping with ``preset`` and changed settings; or a mapping with
                ``prefill`` and ``decode``, each of them a mode or a list with a mode a layer.
            layers: how many layers the model has, for presets that choose some of them.

        Raises:
            TypeError: ``value`` is none of them.
            ValueError: a mode, a preset or a setting is unknown; a phase is missing or unknown.
        """
        if isinstance(value, str):
            check_known("mode or a preset", value, [*MODES, *PRESETS])
            value = {"preset" if value in PRESETS else "mode": value}
        if isinstance(value, Mapping) and "preset" in value:
            if layers is None:
                raise ValueError("`layers`: a preset needs the number of the model's layers")
            value = parse_preset(value, layers)
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

    def modes(self, layer: int) -> tuple[Any, Any]:
        """Return the modes of a layer in both phases."""
        return self.mode(layer, "prefill"), self.mode(layer, "decode")

    def kept(self, layer: int) -> Kept | None:
        """Return what the cache of a layer has to keep; None: everything."""
        prefill, decode = (mode.kept for mode in self.modes(layer))
        if prefill is None or decode is None:
            return None
        return Kept(max(prefill.recent, decode.recent), max(prefill.sinks, decode.sinks))

    @property
    def has_phases(self) -> bool:
        """Whether generated tokens are treated otherwise than those of a prompt."""
        return self.prefill != self.decode

    def uses(self, kind: type) -> bool:
        """Tell whether any layer has a mode of that class."""
        return any(isinstance(mode, kind) for mode in self.prefill + self.decode)

    def uses_only(self, kind: type) -> bool:
        """Tell whether all layers have modes of that class in both phases."""
        return all(isinstance(mode, kind) for mode in self.prefill + self.decode)

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
            **json.loads(json.dumps(dataclasses.asdict(mode))),  # JSON has lists, no tuples
        }
        for mode in modes
    ]
    return data[0] if len(data) == 1 else data
