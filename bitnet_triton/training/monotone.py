"""Evolution of lists of numbers that never fall: LongRoPE's search, without a model.

A run is a function of its seed and of what the loss says: whoever remembers losses can repeat it
up to where it was stopped, and go on to the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

Factors = tuple[float, ...]
Loss = Callable[[Factors], float]

_STEP = 100  # grid points of one
_MUTATES, _CROSSES = 0.3, 0.15  # probabilities of a gene
_TRIES = 20


@dataclass(frozen=True)
class Generation:
    """One round.

    Attributes:
        ranked: losses and lists, the best first.
    """

    ranked: tuple[tuple[float, Factors], ...]

    @property
    def best(self) -> Factors:
        """The list of the smallest loss."""
        return self.ranked[0][1]


def evolve(
    start: Mapping[str, Factors],
    loss: Loss,
    *,
    most: float,
    population: int,
    rounds: int,
    seed: int,
) -> Iterator[Generation]:
    """Yield the first population and those that follow it (arXiv:2402.13753, algorithm 1).

    Half of a population stays; a quarter is mutated from it, a quarter crossed.

    Args:
        start: individuals to begin with, by name; they are completed by their mutations.
        loss: what is to become small; asked once for each list.
        most: no drawn number is above it; none is below 1.
        population: individuals of a round.
        rounds: after the first population.
        seed: of all draws.
    """
    rng = Random(f"longrope:{seed}")
    known: dict[Factors, float] = {}

    def ranked(individuals: list[Factors]) -> tuple[tuple[float, Factors], ...]:
        for one in individuals:
            if one not in known:
                known[one] = loss(one)
        return tuple(sorted((known[one], one) for one in individuals))

    alive = list(dict.fromkeys(start.values()))
    parents = tuple(alive)
    while len(alive) < population:
        alive.append(_child(parents, most, rng, alive, crossed=False))
    generation = Generation(ranked(alive))
    yield generation
    for _ in range(rounds):
        parents = tuple(one for _, one in generation.ranked[: max(2, population // 2)])
        alive = list(parents)
        for number in range(max(2, population - len(parents))):
            child = _child(parents, most, rng, [*known, *alive], crossed=bool(number % 2))
            alive.append(child)
        generation = Generation(ranked(list(dict.fromkeys(alive))))
        yield generation


def _child(
    parents: tuple[Factors, ...], most: float, rng: Random, seen: list[Factors], *, crossed: bool
) -> Factors:
    """Return a list that was not met before; where many tries find none, one that was."""
    for _ in range(_TRIES):
        if crossed and len(parents) > 1:
            one, other = rng.sample(parents, 2)
            child = cross(one, other, most, rng)
        else:
            child = mutate(rng.choice(parents), most, rng)
        if child not in seen:
            break
    return child


def mutate(factors: Factors, most: float, rng: Random) -> Factors:
    """Draw some numbers anew, from the grid between their neighbours."""
    child = list(factors)
    for place in range(len(child)):
        if rng.random() < _MUTATES:
            low = child[place - 1] if place else 1.0
            high = child[place + 1] if place + 1 < len(child) else max(most, low)
            first, last = math.ceil(low * _STEP), math.floor(high * _STEP)
            if first <= last:
                child[place] = min(max(rng.randint(first, last) / _STEP, low), high)
    return tuple(child)


def cross(one: Factors, other: Factors, most: float, rng: Random) -> Factors:
    """Take some numbers of ``other``; mutate ``one`` where the result would always fall."""
    for _ in range(_TRIES):
        child = tuple(b if rng.random() < _CROSSES else a for a, b in zip(one, other))
        if child != one and is_monotone(child):
            return child
    return mutate(one, most, rng)


def is_monotone(factors: Factors) -> bool:
    """Tell whether no number is below the one before it."""
    return all(a <= b for a, b in pairwise(factors))
