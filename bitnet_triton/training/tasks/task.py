"""What a task is: it draws facts and questions, and scores an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bitnet_triton.training.tasks.words import Names


@dataclass(frozen=True)
class Question:
    """One question about the facts of a text.

    Attributes:
        words: the question, in pieces that are encoded one by one.
        answer: the words of the answer.
        about: indices of the facts that the answer needs, in the order in which it needs them;
            empty where it needs all of them.
    """

    words: tuple[str, ...]
    answer: tuple[str, ...]
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What a task puts into a text.

    Attributes:
        facts: each in pieces that are encoded one by one; they keep their order in the text.
        questions: asked at the end of the text, one after another.
    """

    facts: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


class Task(Protocol):
    """A task; frozen, so that a name and a seed say everything."""

    @property
    def hard(self) -> bool:
        """Whether it is reported apart, because an average would hide what is lost on it."""

    @property
    def chance(self) -> float:
        """Return the score of a model that knows the form of an answer and nothing of the text."""

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw facts and questions for a text in which so many words have room."""

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """Return the share of the answer that was said, 0 to 1."""


def exact(answer: Sequence[str], said: Sequence[str]) -> float:
    """Score an answer as right or wrong."""
    return float(list(said[: len(answer)]) == list(answer))


def in_place(answer: Sequence[str], said: Sequence[str]) -> float:
    """Score the share of words that stand where they belong."""
    return sum(a == b for a, b in zip(answer, said)) / len(answer)


def as_set(answer: Sequence[str], said: Sequence[str]) -> float:
    """Score the share of words that were said, in any order."""
    return len(set(answer) & set(said[: len(answer)])) / len(answer)
