"""Memories that are chosen by name, instead of the one that an attention mode asks for.

A kind of memory is a frozen dataclass of its settings. ``register_memory`` gives it the name by
which ``config.cache``, ``generate(cache_implementation=...)`` and ``bitnet-triton eval --cache``
choose it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from bitnet_triton.cache.memory import Memory


class MemoryKind:
    """Settings of a memory; subclasses are frozen dataclasses that check them.

    Attributes:
        name: in configs; set by ``register_memory``.
        evicts: whether slots of its memory say nothing about where a token stands in the text, as
            every head drops others: only modes that ``read_any_rows`` take it then.
    """

    name: ClassVar[str] = ""
    evicts: ClassVar[bool] = False

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        raise NotImplementedError

    def to_data(self) -> dict[str, Any]:
        """Return plain data that ``parse_memory`` reads."""
        return {"name": self.name, **dataclasses.asdict(cast("Any", self))}


MEMORIES: dict[str, type[MemoryKind]] = {}

# transformers' own words for caches
_TAKEN = ("own", "dynamic", "static", "offloaded", "offloaded_static", "quantized", "paged")


def register_memory(name: str, kind: type[MemoryKind]) -> None:
    """Let configs and ``generate`` choose a memory by name.

    A process that loads a model whose config names it registers the memory first.

    Args:
        name: in configs; a Python name.
        kind: a frozen dataclass that derives from ``MemoryKind``.

    Raises:
        TypeError: ``kind`` is no frozen dataclass that derives from ``MemoryKind``.
        ValueError: ``name`` is no Python name, or somebody else's; or ``kind`` has another already.
    """
    frozen = isinstance(kind, type) and getattr(kind, "__dataclass_params__", None)
    if not frozen or not frozen.frozen or not issubclass(kind, MemoryKind):
        raise TypeError(
            f"`kind`: expected a frozen dataclass that derives from MemoryKind, got {kind!r}"
        )
    if "name" in {field.name for field in dataclasses.fields(cast("Any", kind))}:
        raise TypeError("`kind`: a setting cannot be called 'name'")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name`: expected a Python name, got {name!r}")
    if name in _TAKEN:
        raise ValueError(f"`name`: {name!r} is a cache of transformers")
    former = vars(kind).get("name", name)
    if former != name:
        raise ValueError(f"`name`: {kind.__name__} is {former!r} already; derive a class from it")
    taken = MEMORIES.get(name)
    # a notebook runs a cell again: the same class by another object
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        kind.__module__, kind.__qualname__,
    ):  # fmt: skip
        raise ValueError(f"`name`: {name!r} is {taken.__module__}.{taken.__qualname__}")
    kind.name = name
    MEMORIES[name] = kind


def parse_memory(value: str | Mapping[str, Any]) -> MemoryKind:
    """Build the settings of a memory from plain data.

    Args:
        value: a name, or a mapping with ``name`` and the settings of that memory.

    Raises:
        TypeError: ``value`` is neither, a setting without a default is missing, or has a wrong
            type.
        ValueError: the memory or a setting is unknown, or a setting is out of range.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"`cache`: expected a name or a dict, got {type(value).__name__}")
    settings = dict(value)
    name = settings.pop("name", None)
    _check_known("memory", name, MEMORIES)
    fields = dataclasses.fields(cast("Any", MEMORIES[name]))
    for key in settings:
        _check_known(f"setting of {name!r}", key, [field.name for field in fields])
    for field in fields:
        defaults = field.default, field.default_factory
        if all(d is dataclasses.MISSING for d in defaults) and field.name not in settings:
            raise TypeError(f"`cache`: {name!r}: the setting {field.name!r} is missing")
    return MEMORIES[name](**settings)


def check_whole(name: str, value: object, least: int) -> None:
    """Raise unless the setting ``name`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`cache`: {name!r}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`cache`: {name!r}: expected at least {least}, got {value}")


def _check_known(what: str, word: object, known: Iterable[str]) -> None:
    names = list(known)
    if word in names:
        return
    close = difflib.get_close_matches(str(word), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"`cache`: expected a {what} out of: {', '.join(names) or 'none'}; got {word!r}{hint}"
    )
