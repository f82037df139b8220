"""Name -> task; the only place that lists them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from bitnet_triton.training.tasks.aggregation import CommonWords, FrequentWords
from bitnet_triton.training.tasks.association import Association
from bitnet_triton.training.tasks.copying import Copy
from bitnet_triton.training.tasks.needles import Needles
from bitnet_triton.training.tasks.passkey import Passkey
from bitnet_triton.training.tasks.recall import Recall
from bitnet_triton.training.tasks.task import Task
from bitnet_triton.training.tasks.tracking import Tracking

TASKS: dict[str, Task] = {
    "passkey": Passkey(),
    "needle": Needles(),
    "needles": Needles(words_per_note=64),
    "recall": Recall(),
    "tracking": Tracking(),
    "copy": Copy(),
    "association": Association(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
}


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: there is no task of a name; the nearest one is named.
    """
    names = list(names)
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}"
            raise ValueError(f"`tasks`: unknown task {name!r}; {hint}")
    return names
