"""Name -> attention mode: those of this package, and those that users register."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from bitnet_triton.attention.checks import check_known
from bitnet_triton.attention.mode import Mode
from bitnet_triton.attention.modes.fixed import Fixed
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.indexed_blocks import IndexedBlocks
from bitnet_triton.attention.modes.linear import Linear
from bitnet_triton.attention.modes.local import Local
from bitnet_triton.attention.modes.longformer import Longformer
from bitnet_triton.attention.modes.lsh_sampling import LshSampling
from bitnet_triton.attention.modes.native_sparse import NativeSparse
from bitnet_triton.attention.modes.pooled_blocks import PooledBlocks
from bitnet_triton.attention.modes.quest import Quest
from bitnet_triton.attention.modes.reformer import Reformer
from bitnet_triton.attention.modes.routing import Routing
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.modes.streaming import Streaming
from bitnet_triton.attention.modes.strided import Strided
from bitnet_triton.attention.modes.threshold import Threshold
from bitnet_triton.attention.modes.top_k import TopK
from bitnet_triton.attention.modes.verified_sampling import VerifiedSampling
from bitnet_triton.attention.swaa import PRESETS

MODES: dict[str, type[Mode]] = {}


def register_mode(name: str, kind: type[Mode]) -> None:
    """Let configs choose an attention mode by name.

    A registered mode does whatever those of this package do: it is chosen in ``config.attention``
    by layer and phase, saved and loaded, runs in fused layers, brings parameters and a memory of
    its own, and has its decode steps recorded. A process that loads such a model registers the
    mode first.

    Args:
        name: in configs; also of the submodule that holds its parameters, so a Python name.
        kind: a frozen dataclass that derives from ``Mode``.

    Raises:
        TypeError: ``kind`` is no frozen dataclass that derives from ``Mode``.
        ValueError: ``name`` is no Python name, or another mode or a preset has it; or ``kind`` has
            another name already.
    """
    frozen = isinstance(kind, type) and getattr(kind, "__dataclass_params__", None)
    if not frozen or not frozen.frozen or not issubclass(kind, Mode):
        raise TypeError(f"`kind`: expected a frozen dataclass that derives from Mode, got {kind!r}")
    taken_words = {"mode", "name"} & {field.name for field in dataclasses.fields(cast("Any", kind))}
    if taken_words:
        raise TypeError(f"`kind`: a setting cannot be called {taken_words.pop()!r}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name`: expected a Python name, got {name!r}")
    if name in PRESETS:
        raise ValueError(f"`name`: {name!r} is a preset")
    former = vars(kind).get("name", name)
    if former != name:
        raise ValueError(f"`name`: {kind.__name__} is {former!r} already; derive a class from it")
    taken = MODES.get(name)
    # a notebook runs a cell again: the same class by another object
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        kind.__module__, kind.__qualname__,
    ):  # fmt: skip
        raise ValueError(f"`name`: {name!r} is {taken.__module__}.{taken.__qualname__}")
    kind.name = name
    MODES[name] = kind


for _name, _kind in {
    "full": Full,
    "sliding": Sliding,
    "longformer": Longformer,
    "streaming": Streaming,
    "local": Local,
    "strided": Strided,
    "fixed": Fixed,
    "top_k": TopK,
    "threshold": Threshold,
    "lsh_sampling": LshSampling,
    "verified_sampling": VerifiedSampling,
    "pooled_blocks": PooledBlocks,
    "indexed_blocks": IndexedBlocks,
    "quest": Quest,
    "native_sparse": NativeSparse,
    "reformer": Reformer,
    "routing": Routing,
    "linear": Linear,
}.items():
    register_mode(_name, _kind)


def parse_mode(value: str | Mapping[str, Any]) -> Mode:
    """Build a mode from plain data.

    Args:
        value: a mode's name, or a mapping with ``mode`` and the settings of that mode.

    Raises:
        TypeError: ``value`` is neither, a setting without a default is missing, or has a wrong
            type.
        ValueError: the mode or a setting is unknown, or a setting is out of range.
    """
    if isinstance(value, str):
        value = {"mode": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"`attention`: expected a name or a dict, got {type(value).__name__}")
    settings = dict(value)
    name = settings.pop("mode", None)
    check_known("mode", name, MODES)
    fields = dataclasses.fields(cast("Any", MODES[name]))
    for key in settings:
        check_known(f"setting of mode {name!r}", key, [field.name for field in fields])
    for field in fields:
        defaults = field.default, field.default_factory
        if all(d is dataclasses.MISSING for d in defaults) and field.name not in settings:
            raise TypeError(f"`attention`: mode {name!r}: the setting {field.name!r} is missing")
    mode = MODES[name](**{key: _as_tuple(setting) for key, setting in settings.items()})
    try:
        hash(mode)
    except TypeError as error:
        raise TypeError(
            f"`attention`: mode {name!r}: expected settings of numbers, words and lists ({error})"
        ) from error
    return mode


def _as_tuple(setting: Any) -> Any:
    """JSON has lists, no tuples; the settings of a mode do not change."""
    return tuple(map(_as_tuple, setting)) if isinstance(setting, list) else setting
