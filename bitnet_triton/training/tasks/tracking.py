"""Variable tracking (RULER, vt): a value is copied from name to name, and its way is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_triton.training.tasks.task import Draw, Question, in_place
from bitnet_triton.training.tasks.words import NAMES, Names


@dataclass(frozen=True)
class Tracking:
    """Chains of copies, spread over the text in order; one of them is asked for.

    Attributes:
        hops: copies in a chain.
        words_per_chain: one chain for so many words of the text, two at least.
        most: no more chains than that.
        asked: how many are asked for; None: all.
    """

    hops: int = 4
    words_per_chain: int = 256
    most: int = 8
    asked: int | None = 1

    hard = False
    chance = 1 / len(NAMES)

    def draw(self, rng: random.Random, names: Names, room: int) -> Draw:
        """Draw the chains, mixed but each in its order."""
        count = min(max(2, room // self.words_per_chain), self.most)
        chains = [names.take(self.hops + 1) for _ in range(count)]
        chains = [chain for chain in chains if len(chain) == self.hops + 1]
        turns = [chain for chain in range(len(chains)) for _ in range(self.hops)]
        rng.shuffle(turns)
        facts, about = [], [[] for _ in chains]  # type: ignore[var-annotated]
        for chain in turns:
            hop = len(about[chain])
            about[chain].append(len(facts))
            facts.append(("\n[copy]", *chains[chain][hop : hop + 2]))
        order = rng.sample(range(len(chains)), len(chains))[: self.asked]
        return Draw(
            tuple(facts),
            tuple(
                Question(("\n[trace]", chains[i][0]), tuple(chains[i][1:]), tuple(about[i]))
                for i in order
            ),
        )

    def score(self, answer: Sequence[str], said: Sequence[str]) -> float:
        """The share of names that were found; one wrong name misleads all later ones."""
        return in_place(answer, said)
