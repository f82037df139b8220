"""Name -> attention mode; the only place that lists the modes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from bitnet_triton.attention.full import Full

MODES: dict[str, type] = {"full": Full}


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_mode(value: str | Mapping[str, Any]) -> Any:
    """Build a mode from plain data.

    Args:
        value: a mode's name, or a mapping with ``mode`` and the settings of that mode.

    Raises:
        TypeError: ``value`` is neither, or a setting without a default is missing.
        ValueError: the mode or a setting is unknown.
    """
    if isinstance(value, str):
        value = {"mode": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"`attention`: expected a name or a dict, got {type(value).__name__}")
    settings = dict(value)
    name = settings.pop("mode", None)
    if name not in MODES:
        known = ", ".join(sorted(MODES))
        raise ValueError(
            f"`attention`: expected a mode out of: {known}; got {name!r}{_hint(str(name), MODES)}"
        )
    fields = [field.name for field in dataclasses.fields(MODES[name])]
    for key in settings:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(
                f"`attention`: mode {name!r} has no setting {key!r} "
                f"(settings: {known}){_hint(key, fields)}"
            )
    try:
        return MODES[name](**settings)
    except TypeError as error:  # a setting without a default is missing
        raise TypeError(f"`attention`: mode {name!r}: {error}") from error
