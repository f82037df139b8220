"""Name -> attention mode; the only place that lists the modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bitnet_triton.attention.checks import check_known
from bitnet_triton.attention.exact import Threshold, TopK
from bitnet_triton.attention.full import Full
from bitnet_triton.attention.longformer import Longformer
from bitnet_triton.attention.patterns import Fixed, Local, Strided
from bitnet_triton.attention.sliding import Sliding
from bitnet_triton.attention.streaming import Streaming

MODES: dict[str, type] = {
    "full": Full,
    "sliding": Sliding,
    "longformer": Longformer,
    "streaming": Streaming,
    "local": Local,
    "strided": Strided,
    "fixed": Fixed,
    "top_k": TopK,
    "threshold": Threshold,
}


def parse_mode(value: str | Mapping[str, Any]) -> Any:
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
    fields = dataclasses.fields(MODES[name])
    for key in settings:
        check_known(f"setting of mode {name!r}", key, [field.name for field in fields])
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in settings:
            raise TypeError(f"`attention`: mode {name!r}: the setting {field.name!r} is missing")
    return MODES[name](**settings)
