"""Presets of sliding window adaptation, SWAA (arXiv:2512.10411): plans by name.

A model that was trained with full attention loses most of its sense under a plain window. Four
recipes bring it back, and add up: generated tokens read everything, some layers do, every token
reads the first ones, and fine-tuning with the same mask. The presets are the combinations that the
paper recommends; every setting can be changed beside the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_triton.attention.checks import check_known, check_number


@dataclass(frozen=True)
class Recipe:
    """How a model with full attention is run with windows.

    Attributes:
        window: keys that a token sees, itself included.
        sinks: first tokens of the text that every token sees as well.
        full_decode: whether generated tokens see everything; the cache then keeps everything.
        full_layers: layers that see everything in both phases: their indices, or "odd", "even" or
            "every-N", the last of every N. Which ones serve best depends on the model.
    """

    window: int = 4096
    sinks: int = 0
    full_decode: bool = False
    full_layers: str | Sequence[int] = ()

    def __post_init__(self) -> None:
        check_number("window", self.window, 1)
        check_number("sinks", self.sinks, 0)
        if not isinstance(self.full_decode, bool):
            got = type(self.full_decode).__name__
            raise TypeError(f"`attention`: 'full_decode': expected true or false, got {got}")

    def to_plan(self, layers: int) -> dict[str, Any]:
        """Return the plan of a model with that many layers, as ``config.attention`` takes it.

        Raises:
            ValueError: ``full_layers`` names a layer that the model does not have.
        """
        sliding = {"mode": "sliding", "window": self.window, "sinks": self.sinks}
        chosen = choose_layers(self.full_layers, layers)
        prefill: Any = [{"mode": "full"} if i in chosen else sliding for i in range(layers)]
        prefill = prefill if chosen else sliding
        decode = {"mode": "full"} if self.full_decode else prefill
        return {"prefill": prefill, "decode": decode}


PRESETS = {
    "swaa": Recipe(),
    "swaa-untrained": Recipe(sinks=128, full_decode=True, full_layers="odd"),
    "swaa-untrained-fast": Recipe(sinks=128, full_decode=True),
    "swaa-trained": Recipe(full_decode=True, full_layers="odd"),
    "swaa-trained-fast": Recipe(full_layers="odd"),
}


_THINK = (
    "The text above is long. Do not answer at once. Think step by step: look for the passages that "
    "matter, say what each of them tells, and go back over the text several times before deciding."
)


def ask_to_think(prompt: str) -> str:
    """Return ``prompt`` with a request to reason first.

    What a window hides from a prompt, generated tokens that see everything can look up: with
    ``full_decode``, the longer a model reasons, the more of a long text it takes in.
    """
    return f"{prompt.rstrip()}\n\n{_THINK}\n"


def parse_preset(value: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Turn a mapping with ``preset`` and changed settings into a plan.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: the preset or a setting is unknown, or out of range.
    """
    settings = dict(value)
    name = settings.pop("preset")
    check_known("preset", name, PRESETS)
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for key in settings:
        check_known(f"setting of preset {name!r}", key, fields)
    return dataclasses.replace(PRESETS[name], **settings).to_plan(layers)


def choose_layers(value: str | Sequence[int], layers: int) -> set[int]:
    """Return the indices that ``value`` names among so many layers.

    Raises:
        TypeError: ``value`` is neither a word nor a list of integers.
        ValueError: the word is unknown, or a layer does not exist.
    """
    if isinstance(value, str):
        return _by_word(value, layers)
    if not isinstance(value, Sequence):
        got = type(value).__name__
        raise TypeError(f"`attention`: 'full_layers': expected a word or a list, got {got}")
    chosen = set()
    for index in value:
        check_number("full_layers", index, 0)
        if int(index) >= layers:
            raise ValueError(
                f"`attention`: 'full_layers': expected layers below {layers}, got {index}"
            )
        chosen.add(int(index))
    return chosen


def _by_word(word: str, layers: int) -> set[int]:
    start_and_step = {"odd": (1, 2), "even": (0, 2)}.get(word)
    if start_and_step is None:
        count = word.removeprefix("every-")
        if count == word or not count.isdecimal() or int(count) == 0:
            raise ValueError(
                "`attention`: 'full_layers': expected 'odd', 'even', 'every-N' or a list, got "
                f"{word!r}"
            )
        start_and_step = int(count) - 1, int(count)
    start, step = start_and_step
    return set(range(start, layers, step))
