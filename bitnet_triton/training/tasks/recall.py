"""Associative recall with many queries (MQAR, arXiv:2312.04927): lines full of pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, exact
from bitnet_triton.training.tasks.words import NUMBERS, Names

_PAIRS_PER_LINE = 8


@dataclass(frozen=True)
class Recall:
    """Lines of names and numbers in turns; each name stands once.

    Attributes:
        words_per_pair: one pair for so many words of the text.
        most: no more pairs than that.
        asked: how many pairs are asked for; None: all.
    """

    words_per_pair: int = 16
    most: int = 224
    asked: int | None = 8

    hard = False
    chance = 1 / len(NUMBERS)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the pairs, and which are asked for."""
        keys = names.take(min(max(2, room // self.words_per_pair), self.most))
        values = [rng.choice(NUMBERS) for _ in keys]
        facts = []
        for start in range(0, len(keys), _PAIRS_PER_LINE):
            line = slice(start, start + _PAIRS_PER_LINE)
            pairs = [word for pair in zip(keys[line], values[line]) for word in pair]
            facts.append(("\n[pairs]", *pairs))
        order = rng.sample(range(len(keys)), len(keys))[: self.asked]
        questions = [
            # the first question says what is asked for, the others go on
            Question(
                ("\n[pairs]", keys[i]) if first == 0 else (keys[i],),
                (values[i],),
                (i // _PAIRS_PER_LINE,),
            )
            for first, i in enumerate(order)
        ]
        return Draw(tuple(facts), tuple(questions))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """Right or wrong, for each question."""
        return exact(answer, said)
