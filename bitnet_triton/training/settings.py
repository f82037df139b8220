"""A setting: how one and the same model attends, remembers and counts positions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitnet_triton.attention.registry import MODES
from bitnet_triton.attention.swaa import PRESETS
from bitnet_triton.cache import MEMORIES, parse_memory
from bitnet_triton.models.bitnet.planned import named_cache
from bitnet_triton.models.extend import METHODS
from bitnet_triton.training.options import read_json

# Name -> what makes an empty cache for so many tokens; None: what the attention asks for
CACHES: dict[str, Callable[[Any, int], Any]] = {
    "own": lambda model, length: None,
    "dynamic": lambda model, length: DynamicCache(),
    "static": lambda model, length: StaticCache(config=model.config, max_cache_len=length),
}


def make_cache(name: str, model: Any, length: int) -> Any:
    """Return an empty cache for so many tokens; None: the one that the attention asks for.

    Args:
        name: as ``Setting.cache``.
        model: a ``BitNetForCausalLM``.
        length: of the text.
    """
    if name in CACHES:
        return CACHES[name](model, length)
    return named_cache(model, parse_cache(name))


def parse_cache(text: str) -> dict[str, Any]:
    """Read a memory and its settings as the command line has them, ``h2o:budget=0.2``, or JSON.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: it is none, or one of its settings is unknown or out of range.
    """
    found = _parse(text, "cache")
    if "name" not in found:
        found["name"] = found.pop("mode", None)
    name = found["name"]
    if name not in MEMORIES:
        known = ", ".join([*CACHES, *MEMORIES])
        raise ValueError(f"`cache`: expected one of {known}, got {text!r}")
    return parse_memory(found).to_data()


@dataclass(frozen=True)
class Setting:
    """What is changed in a model before it is measured.

    Attributes:
        name: how tables and plots call it.
        attention: ``config.attention``; None: as the checkpoint says.
        cache: ``own`` is the one that the attention asks for; ``dynamic`` and ``static`` are those
            of transformers, which keep everything; or a memory as ``config.cache`` names it, with
            settings as in ``h2o:budget=0.2``.
        rope: fields of ``config.rope_parameters`` to change; empty: none.
    """

    name: str
    attention: dict[str, Any] | None = None
    cache: str = "own"
    rope: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.has_memory:
            parse_cache(self.cache)
        kind = self.rope.get("rope_type", "default")
        known = list(dict.fromkeys(["default", *METHODS, *ROPE_INIT_FUNCTIONS]))
        if kind not in known:
            raise ValueError(f"`rope`: expected one of {', '.join(known)}, got {kind!r}")
        factor = self.rope.get("factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
            raise ValueError(f"`rope`: 'factor': expected a positive number, got {factor!r}")

    @property
    def has_memory(self) -> bool:
        """Whether its cache is a memory that is chosen by name."""
        return self.cache not in CACHES

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name, "attention": self.attention, "cache": self.cache, "rope": self.rope,
        }  # fmt: skip


def parse_setting(
    text: str | Mapping[str, Any], cache: str = "own", rope: str | None = None
) -> Setting:
    """Read a setting as the command line has it.

    Args:
        text: ``checkpoint`` for the attention that the model was saved with; a mode or a preset,
            alone or with its settings, ``sliding:window=256,sinks=4``; JSON as in
            ``config.attention``; the path of a file that ends in ``.json`` and has that; or a
            mapping that is that.
        cache: see ``Setting``.
        rope: JSON, or a type with its fields, ``yarn:factor=4``.

    Raises:
        ValueError: the JSON is broken, there is no such file, a field has no value, or the cache is
            unknown. Whether a model can be set like that is found out when it is loaded.
    """
    attention: dict[str, Any] | None
    if isinstance(text, Mapping):
        attention, text = dict(text), json.dumps(text)
    else:
        attention = None if text == "checkpoint" else _parse(text, "attention")
    changed = {} if rope is None else _parse(rope, "rope")
    if rope is not None and "mode" in changed:
        changed["rope_type"] = changed.pop("mode")
    parts = [text, *([] if cache == "own" else [cache]), *([] if rope is None else [rope])]
    return Setting(" ".join(parts), attention, cache, changed)


def combine(
    attention: Sequence[str], cache: Sequence[str] = (), rope: Sequence[str] = ()
) -> list[Setting]:
    """Return every combination of what is listed; the defaults where nothing is."""
    ropes: Iterable[str | None] = rope or (None,)
    combined = itertools.product(attention or ["checkpoint"], cache or ["own"], ropes)
    return [parse_setting(*parts) for parts in combined]


def _parse(text: str, option: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{option}`: expected JSON ({error})") from error
    if text.endswith(".json"):
        return read_json(text, option)
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {"preset" if name in PRESETS and name not in MODES else "mode": name}
    while rest := rest.lstrip(" ,"):
        key, equals, rest = rest.partition("=")
        if not equals or "," in key:
            raise ValueError(f"`{option}`: expected {key.partition(',')[0]}=value in {text!r}")
        found[key.strip()], rest = _first_value(rest.lstrip())
    return found


def _first_value(text: str) -> tuple[Any, str]:
    """Return JSON, in which commas may stand, or a word; and what stands behind it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if text[end:].lstrip()[:1] in ("", ","):
            return value, text[end:]
    except json.JSONDecodeError:
        pass
    word, _, rest = text.partition(",")
    return word, rest
