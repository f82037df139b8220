"""Passkey: one number, said once, asked for at the end (arXiv:2305.16300)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, exact
from bitnet_triton.training.tasks.words import NUMBERS, Names


@dataclass(frozen=True)
class Passkey:
    """One fact of its kind in the whole text."""

    hard = False
    chance = 1 / len(NUMBERS)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the number."""
        number = rng.choice(NUMBERS)
        question = Question(("\n[pass]",), (number,), (0,))
        return Draw((("\n[pass]", number),), (question,))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """Right or wrong."""
        return exact(answer, said)
