"""The tasks as a model is trained on them: of any density, several in one text, all asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from bitnet_triton.training.tasks.prompt import Prompt, build
from bitnet_triton.training.tasks.registry import TASKS
from bitnet_triton.training.tasks.task import Task
from bitnet_triton.training.tasks.tokens import TextTokens
from bitnet_triton.training.tasks.words import Names

MIX: dict[str, Callable[[random.Random], Task]] = {
    "recall": lambda rng: changed("recall", words_per_pair=sparsity(rng, 6), asked=None),
    "needles": lambda rng: changed("needles", words_per_note=sparsity(rng, 10), asked=None),
    "passkey": lambda rng: TASKS["passkey"],
    "copy": lambda rng: TASKS["copy"],
    "tracking": lambda rng: changed(
        "tracking",
        hops=rng.choice((1, 2, 3, 4, 4)),
        words_per_chain=sparsity(rng, 32),
        asked=None,
    ),
    "association": lambda rng: changed("association", words_per_note=sparsity(rng, 10), asked=None),
}
ALONE = ("common_words", "frequent_words")
ALONE_PERCENT = 15


def changed(name: str, **settings: Any) -> Task:
    """Return the task of a name with other settings."""
    return replace(cast("Any", TASKS[name]), **settings)


def sparsity(rng: random.Random, least: int) -> int:
    """Return how many words of a text there are for each fact: few, or up to 64 times as many."""
    return round(least * 2 ** rng.triangular(0, 6, 0))


def draw_prompt(rng: random.Random, tokens: TextTokens, length: int) -> tuple[list[str], Prompt]:
    """Draw the tasks of one text and build it; names the task of each question."""
    names, words = Names(rng), length // tokens.per_word
    if rng.random() * 100 < ALONE_PERCENT:
        chosen = [rng.choice(ALONE)]
        draws = [TASKS[chosen[0]].draw(rng, names, words)]
        return chosen, build(draws, tokens, length, rng)
    # a short text holds one kind of facts, many of them; a long one may hold all kinds
    chosen = rng.sample(list(MIX), rng.randint(1, min(len(MIX), 1 + length // 256)))
    room = int(0.8 * words / len(chosen))
    draws = [MIX[name](rng).draw(rng, names, room) for name in chosen]
    while True:
        try:
            prompt = build(draws, tokens, length, rng)
        except ValueError:
            draws, chosen = draws[:-1], chosen[:-1]  # too much for so short a text
            continue
        return [name for name, draw in zip(chosen, draws) for _ in draw.questions], prompt


def draw_dense(rng: random.Random, tokens: TextTokens, length: int) -> tuple[list[str], Prompt]:
    """Draw a text without a text: one list, or some facts, asked for again and again.

    A third to a half of its tokens are answers, and no guess gets far.
    """
    names, name = Names(rng), rng.choice(("copy", "recall", "association", "association"))
    size = round(2 ** rng.uniform(2, 5))
    if name == "copy":
        draw = changed("copy", words=size).draw(rng, names, 4 * size)
    elif name == "recall":
        task = changed("recall", words_per_pair=1, asked=None)
        draw = task.draw(rng, names, min(size, length // 5))
    else:
        task = changed("association", words_per_note=1, asked=None)
        draw = task.draw(rng, names, min(size, length // 8))
    first, *rest = draw.questions
    questions, used = [first], 1 + sum(map(len, (*draw.facts, first.words, first.answer)))
    while True:
        for question in rng.sample(rest or [first], len(rest) or 1):
            used += len(question.words) + len(question.answer)
            if used > length:
                prompt = build([replace(draw, questions=tuple(questions))], tokens, length, rng)
                return [name] * len(questions), prompt
            questions.append(question)
