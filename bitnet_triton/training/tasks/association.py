"""Association (after NoLiMa, arXiv:2502.05167): question and fact have no word in common.

A note is about a name, the question about the name that goes with it. Which names go together the
text never says: a model has to know it from its training (``words.partner``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, exact
from bitnet_triton.training.tasks.words import NUMBERS, Names, partner


@dataclass(frozen=True)
class Association:
    """Notes as in ``Needles``; one is asked for by the partner of its name.

    Attributes:
        words_per_note: one note for so many words of the text, two at least.
        most: no more notes than that.
        asked: how many are asked for; None: all.
    """

    words_per_note: int = 64
    most: int = 32
    asked: int | None = 1

    hard = True
    chance = 1 / len(NUMBERS)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the notes, and which are asked for."""
        keys = names.take_alone(min(max(2, room // self.words_per_note), self.most))
        values = [rng.choice(NUMBERS) for _ in keys]
        facts = tuple(("\n[note]", key, value) for key, value in zip(keys, values))
        order = rng.sample(range(len(keys)), len(keys))[: self.asked]
        return Draw(
            facts,
            tuple(Question(("\n[kin]", partner(keys[i])), (values[i],), (i,)) for i in order),
        )

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """Right or wrong."""
        return exact(answer, said)
