"""Checks of the settings of modes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_number(name: str, value: object, least: int) -> None:
    """Raise unless the setting ``name`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`attention`: {name!r}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`attention`: {name!r}: expected at least {least}, got {value}")


def check_known(what: str, word: object, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest known word, unless ``word`` is among the known ones."""
    names = list(known)
    if word in names:
        return
    close = difflib.get_close_matches(str(word), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"`attention`: expected a {what} out of: {', '.join(names) or 'none'}; got {word!r}{hint}"
    )
