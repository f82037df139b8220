"""AttentionPlan: which mode each layer uses in each phase; plain data in, plain data out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from bitnet_triton.attention.checks import check_known
from bitnet_triton.attention.context import PHASES
from bitnet_triton.attention.mode import Mode
from bitnet_triton.attention.registry import MODES, parse_mode
from bitnet_triton.attention.swaa import PRESETS, parse_preset
from bitnet_triton.cache import Memory, MemoryKind, parse_memory


@dataclass(frozen=True)
class AttentionPlan:
    """The modes of a model.

    Attributes:
        prefill: for the tokens of a prompt: one mode for all layers, or one for each.
        decode: the same, for generated tokens.
        cache: the memory of layers whose modes keep everything; None: the plain one.
    """

    prefill: tuple[Mode, ...]
    decode: tuple[Mode, ...]
    cache: MemoryKind | None = dataclasses.field(default=None, kw_only=True)

    @classmethod
    def from_config(
        cls,
        value: str | Mapping[str, Any],
        layers: int | None = None,
        cache: str | Mapping[str, Any] | None = None,
    ) -> AttentionPlan:
        """Build a plan from ``config.attention``.

        Args:
            value: a mode, as its name or as a mapping with ``mode`` and its settings; a preset, as
                its name or as a mapping with ``preset`` and changed settings; or a mapping with
                ``prefill`` and ``decode``, each of them a mode or a list with a mode a layer.
            layers: how many layers the model has, for presets that choose some of them.
            cache: as ``config.cache`` has it: a memory by name, alone or with its settings.

        Raises:
            TypeError: ``value`` is none of them, or ``cache`` neither a name nor a mapping.
            ValueError: a mode, a preset, a memory or a setting is unknown; a phase is missing or
                unknown.
        """
        plan = cls._modes_from_config(value, layers)
        return plan if cache is None else dataclasses.replace(plan, cache=parse_memory(cache))

    @classmethod
    def _modes_from_config(
        cls, value: str | Mapping[str, Any], layers: int | None
    ) -> AttentionPlan:
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
        """Return the modes as plain data that ``from_config`` reads."""
        prefill, decode = _to_data(self.prefill), _to_data(self.decode)
        if len(self.prefill) == 1 and prefill == decode:
            return prefill
        return {"prefill": prefill, "decode": decode}

    def mode(self, layer: int, phase: str) -> Mode:
        """Return the mode of a layer in a phase."""
        modes = self.prefill if phase == "prefill" else self.decode
        return modes[0] if len(modes) == 1 else modes[layer]

    def modes(self, layer: int) -> tuple[Mode, Mode]:
        """Return the modes of a layer in both phases."""
        return self.mode(layer, "prefill"), self.mode(layer, "decode")

    def __iter__(self) -> Iterator[Mode]:
        """Yield every mode that some layer has in some phase."""
        return iter(self.prefill + self.decode)

    def memory(self, layer: int) -> Memory:
        """Return an empty memory of a layer, which serves its modes in both phases.

        A layer that keeps no more than a window goes on with that, whatever ``cache`` says.

        Raises:
            ValueError: no memory serves both, or ``cache`` does not serve them.
        """
        prefill, decode = self.modes(layer)
        own = decode.memory(prefill)
        if self.cache is None or own.get_max_length() != -1:
            return own
        for mode in (prefill, decode):
            objection = None
            if not own.is_plain and mode.brings_memory:
                objection = "keeps a memory of its own"
            elif self.cache.evicts and not mode.reads_any_rows:
                objection = "goes by the places of keys, or tells nobody what they got"
            if objection is not None:
                raise ValueError(
                    f"`cache`: {self.cache.name!r} does not go with attention {mode.name!r}, "
                    f"which {objection}"
                )
        return self.cache.memory()

    @property
    def has_phases(self) -> bool:
        """Whether generated tokens are treated otherwise than those of a prompt."""
        return self.prefill != self.decode

    @property
    def wants_prompt_len(self) -> bool:
        """Whether the length of the prompt has to be known."""
        return self.has_phases or any(mode.wants_prompt_len for mode in self)

    @property
    def counts_positions(self) -> bool:
        """Whether positions go by what the cache holds."""
        return any(mode.counts_positions for mode in self)

    @property
    def span(self) -> int | None:
        """How many tokens a query sees, where no layer looks further; None: one may."""
        spans = [mode.span for mode in self]
        known = [span for span in spans if span is not None]
        return max(known) if len(known) == len(spans) else None

    @property
    def reads_hidden_states(self) -> bool:
        """Whether any mode reads what enters its layer."""
        return any(mode.reads_hidden_states for mode in self)

    @property
    def takes_global_tokens(self) -> bool:
        """Whether ``forward`` and ``generate`` may name global tokens."""
        return any(mode.takes_global_tokens for mode in self)

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless the plan fits a model with that many layers."""
        for phase in PHASES:
            got = len(getattr(self, phase))
            if got not in (1, layers):
                raise ValueError(
                    f"`attention`: expected one mode or {layers}, one a layer, got {got} for "
                    f"{phase!r}"
                )
        # modes that no memory serves together are refused here
        memories = [self.memory(layer) for layer in range(layers)]
        if self.cache is not None and type(self.cache.memory()) not in map(type, memories):
            raise ValueError(
                f"`cache`: no layer is left for {self.cache.name!r}: all of them keep windows"
            )


def _parse_layers(value: Any) -> tuple[Mode, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(parse_mode, value))
    return (parse_mode(value),)


def _to_data(modes: tuple[Mode, ...]) -> Any:
    data = [
        # JSON has lists, no tuples
        {"mode": mode.name, **json.loads(json.dumps(dataclasses.asdict(cast("Any", mode))))}
        for mode in modes
    ]
    return data[0] if len(data) == 1 else data
