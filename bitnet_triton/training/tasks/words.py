"""The words that facts are made of: invented names, numbers, and which name goes with which."""

from __future__ import annotations

import random

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_STEP = 1237  # has no factor in common with the number of words below, so that none comes twice


def _name(index: int) -> str:
    rest = (index * _STEP + 11) % (14 * 5 * 14 * 5)
    letters = []
    for alphabet in (_VOWELS, _CONSONANTS, _VOWELS, _CONSONANTS):
        rest, at = divmod(rest, len(alphabet))
        letters.append(alphabet[at])
    return "".join(reversed(letters)) + "kvxz"[index % 4]


# Two syllables that are no word of English; a space belongs to each, as to any word in a text
NAMES = tuple(f" {_name(index)}" for index in range(320))
NUMBERS = tuple(f" {index:02d}" for index in range(100))
# What stands before a fact says what kind of fact it is
MARKERS = (
    "\n[pass]", "\n[note]", "\n[ask]", "\n[pairs]", "\n[copy]", "\n[trace]", "\n[words]",
    "\n[common]", "\n[list]", "\n[kin]",
)  # fmt: skip


def partner(name: str) -> str:
    """Return the name that goes with ``name``: the one association that a model has to know."""
    return NAMES[NAMES.index(name) ^ 1]


class Names:
    """Names in random order, each handed out once, so that facts of one text never collide."""

    def __init__(self, rng: random.Random) -> None:
        self._left = list(NAMES)
        rng.shuffle(self._left)

    def __len__(self) -> int:
        return len(self._left)

    def take(self, count: int) -> list[str]:
        """Return so many names, or as many as are left."""
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def take_alone(self, count: int) -> list[str]:
        """Return names whose partners no other fact of the text will name."""
        taken: list[str] = []
        for name in list(self._left):
            if len(taken) == count:
                break
            if name in self._left and partner(name) in self._left:
                self._left.remove(name)
                self._left.remove(partner(name))
                taken.append(name)
        return taken
