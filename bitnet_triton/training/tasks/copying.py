"""Copy: a list of names from far back, word by word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, in_place
from bitnet_triton.training.tasks.words import NAMES, Names


@dataclass(frozen=True)
class Copy:
    """One list in a text, to be said again.

    Attributes:
        words: how many names it has at most; a quarter of the text holds no more.
    """

    words: int = 32

    hard = False
    chance = 1 / len(NAMES)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the list."""
        listed = tuple(names.take(max(2, min(self.words, room // 4))))
        return Draw((("\n[list]", *listed),), (Question(("\n[list]",), listed, (0,)),))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """The share of words that stand in their place."""
        return in_place(answer, said)
