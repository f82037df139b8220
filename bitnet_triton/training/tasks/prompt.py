"""Facts in a haystack, questions behind it: a prompt of an exact number of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question
from bitnet_triton.training.tasks.tokens import TextTokens


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: tokens of the question.
        answer: tokens of the answer.
        words: the words of the answer.
        depth: where the first fact that it needs stands, 0 (start) to 1 (end of the context).
    """

    question: list[int]
    answer: list[int]
    words: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Prompt:
    """A context and the questions about it.

    Attributes:
        context: tokens before the first question.
        turns: questions and answers, asked one after another.
        is_text: which tokens of the context are those of a text, and no facts.
    """

    context: list[int]
    turns: list[Turn]
    is_text: list[bool]

    def __len__(self) -> int:
        return len(self.context) + sum(len(t.question) + len(t.answer) for t in self.turns)


def build(
    draws: Sequence[Draw],
    tokens: TextTokens,
    length: int,
    rng: random.Random,
    depth: float | None = None,
) -> Prompt:
    """Hide facts in a text.

    Args:
        draws: of one task, or of several that drew from the same names.
        tokens: of the model.
        length: tokens of context, questions and answers.
        rng: where the facts go, and which text.
        depth: where the first fact stands that the first question needs; others that it needs come
            after it. Default: anywhere.

    Raises:
        ValueError: facts and questions alone are longer than ``length``.
    """
    asked = [(draw, question) for draw in draws for question in draw.questions]
    turns = [(tokens.encode(q.words), tokens.encode(q.answer)) for _, q in asked]
    placed = [_places(draw, rng, depth if n == 0 else None) for n, draw in enumerate(draws)]
    pieces = sorted(
        (place, n, index, tokens.encode(draws[n].facts[index]))
        for n, places in enumerate(placed)
        for index, place in enumerate(places)
    )
    used = len(tokens.start) + sum(len(ids) for *_, ids in pieces)
    used += sum(len(question) + len(answer) for question, answer in turns)
    if used > length:
        raise ValueError(f"`length`: expected room for {used} tokens of facts, got {length}")

    text = tokens.haystack.stretch(rng, length - used)
    context, is_text, done = list(tokens.start), [False] * len(tokens.start), 0
    stands: dict[tuple[int, int], int] = {}
    for place, n, index, ids in pieces:
        upto = round(place * len(text))
        context += text[done:upto]
        is_text += [True] * (upto - done)
        stands[n, index] = len(context)
        context += ids
        is_text += [False] * len(ids)
        done = upto
    context += text[done:]
    is_text += [True] * (len(text) - done)

    numbers = [n for n, draw in enumerate(draws) for _ in draw.questions]
    return Prompt(
        context,
        [
            Turn(*ids, question.answer, _depth(question, n, stands, len(context)))
            for ids, (_, question), n in zip(turns, asked, numbers)
        ],
        is_text,
    )


def _places(draw: Draw, rng: random.Random, depth: float | None) -> list[float]:
    """Return where facts go, 0 to 1, in their order unless a depth moves what is asked for."""
    places = sorted(rng.random() for _ in draw.facts)
    about = draw.questions[0].about if draw.questions else ()
    if depth is None or not about:
        return places
    later = sorted(depth + (1 - depth) * rng.random() for _ in about[1:])
    for index, place in zip(about, [depth, *later]):
        places[index] = place
    return places


def _depth(question: Question, draw: int, stands: dict[tuple[int, int], int], length: int) -> float:
    needed = [stands[draw, index] for index in question.about]
    return min(needed) / length if needed else 0.0
