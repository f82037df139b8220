"""Word aggregation (RULER, cwe and fwe): the most frequent words of a text that is all words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, as_set
from bitnet_triton.training.tasks.words import NAMES, Names

_WORDS_PER_LINE = 16


@dataclass(frozen=True)
class CommonWords:
    """A few words come ten times as often as all others.

    Attributes:
        asked: how many are common.
        ratio: how much more often they come.
        words: how many different words there are.
    """

    asked: int = 3
    ratio: int = 10
    words: int = 60

    hard = True
    chance = 3 / len(NAMES)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the words."""
        kinds = names.take(self.words)
        common = sorted(kinds[: self.asked], key=NAMES.index)
        weights = [self.ratio] * len(common) + [1] * (len(kinds) - len(common))
        text = _fill(rng, common + kinds[self.asked :], weights, room)
        return Draw(_lines(text), (Question(("\n[common]",), tuple(common)),))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """The share of common words that were said, in any order."""
        return as_set(answer, said)


@dataclass(frozen=True)
class FrequentWords:
    """How often a word comes falls with its rank, by a power.

    Attributes:
        asked: how many of the most frequent are asked for.
        power: the n-th word comes ``n ** -power`` times as often as the first.
        words: how many different words there are.
    """

    asked: int = 3
    power: float = 1.5
    words: int = 60

    hard = True
    chance = 3 / len(NAMES)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the words."""
        kinds = names.take(self.words)
        weights = [1000 * (rank + 1) ** -self.power for rank in range(len(kinds))]
        text = _fill(rng, kinds, weights, room)
        return Draw(_lines(text), (Question(("\n[common]",), tuple(kinds[: self.asked])),))

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """The share of the most frequent words that were said, in any order."""
        return as_set(answer, said)


def _fill(
    rng: random.Random, kinds: Sequence[str], weights: Sequence[float], room: int
) -> list[str]:
    """Return words in random order, each as often as its weight says to the nearest word."""
    count = max(room * 9 // 10 - 8, 8)  # lines begin with a marker, and the question needs room
    total, text, due = sum(weights), [], 0.0  # type: ignore[var-annotated]
    for kind, weight in zip(kinds, weights):
        due += count * weight / total
        text += [kind] * (round(due) - len(text))
    rng.shuffle(text)
    return text


def _lines(text: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    starts = range(0, len(text), _WORDS_PER_LINE)
    return tuple(("\n[words]", *text[start : start + _WORDS_PER_LINE]) for start in starts)
