"""Needles: notes that give a name a number, among others of the same form (RULER, niah)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, exact
from bitnet_triton.training.tasks.words import NUMBERS, Names


@dataclass(frozen=True)
class Needles:
    """One note is asked for.

    Attributes:
        words_per_note: one note for so many words of the text; None: one note.
        most: no more notes than that.
        asked: how many are asked for; None: all.
    """

    words_per_note: int | None = None
    most: int = 64
    asked: int | None = 1

    hard = False
    chance = 1 / len(NUMBERS)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw notes, and which are asked for."""
        count = 1
        if self.words_per_note is not None:
            count = min(max(2, room // self.words_per_note), self.most)
        keys = names.take(count)
        values = [rng.choice(NUMBERS) for _ in keys]
        facts = tuple(("\n[note]", key, value) for key, value in zip(keys, values))
        order = rng.sample(range(len(keys)), len(keys))[: self.asked]
        return Draw(facts, tuple(Question(("\n[ask]", keys[i]), (values[i],), (i,)) for i in order))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """Right or wrong."""
        return exact(answer, said)
