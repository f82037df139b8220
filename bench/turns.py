"""Providers take turns: who follows whom, how often, and how one turn is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils import benchmark

from bench.case import Settings, Work

# A longer call is timed by itself: it does not fit the cache, and its own length hides the timer
LONG_CALL_S = 0.25
_MIN_ROUNDS = 3

Advance = Callable[[str], None]


def orders(names: Sequence[str]) -> list[list[str]]:
    """Return rounds in which everybody starts equally often and follows everybody equally often.

    What ran before leaves its marks: a clock that has fallen, threads that still spin, a cache full
    of other data. In a rotation the same provider would always bear those of the same neighbour.
    These are the rows of a balanced square: 0, 1, -1, 2, -2, ... and its shifts (E. J. Williams,
    "Experimental designs balanced for the estimation of residual effects of treatments", 1949). An
    odd number needs the mirrored rows as well.
    """
    count = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    rows = [[names[(shift + step) % count] for step in zigzag] for shift in range(count)]
    mirrored = [row[::-1] for row in rows] if count % 2 else []
    return rows + mirrored


def count_rounds(call_s: float, providers: int, settings: Settings) -> int:
    """Return how many turns a provider has at a point.

    Its share of the budget decides, but three turns are the least, unless three exceed the whole
    budget: then as many as fit, and one at least.
    """
    turn_s = max(call_s, settings.block_s)
    least = max(1, min(_MIN_ROUNDS, int(settings.budget_s / turn_s)))
    share = int(settings.budget_s / providers / turn_s)
    return min(settings.rounds, max(least, share))


def time_in_turns(
    works: Mapping[str, Work],
    call_s: Mapping[str, float],
    settings: Settings,
    advance: Advance = lambda _: None,
) -> dict[str, list[float]]:
    """Return the seconds of one call for each provider and round.

    Slow providers take part in the first rounds only.

    Args:
        works: the providers that are timed.
        call_s: about how long a call of each takes.
        settings: how to measure.
        advance: is told about every round.
    """
    timers = {name: _timer(work, call_s[name], settings) for name, work in works.items()}
    left = {name: count_rounds(call_s[name], len(works), settings) for name in works}
    rounds, square = max(left.values(), default=0), orders(list(works))
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds):
        advance(f"round {i + 1} of {rounds}")
        for name in square[i % len(square)]:
            if len(times[name]) == left[name]:
                continue
            with torch.set_grad_enabled(works[name].grad):
                _settle(works[name], call_s[name], settings)
                times[name].append(timers[name]())
    return times


def _settle(work: Work, call_s: float, settings: Settings) -> None:
    """Let threads of the previous turn fall asleep, then wake up and warm our own."""
    time.sleep(settings.pause_s)
    if call_s < LONG_CALL_S:
        work.call()


def seconds(call: Callable[[], object]) -> float:
    """Return how long one call takes; the clock waits for a GPU."""
    start = benchmark.timer()
    call()
    return benchmark.timer() - start


def _timer(work: Work, call_s: float, settings: Settings) -> Callable[[], float]:
    """Return a function that runs one turn and gives the seconds of a call."""
    if call_s >= LONG_CALL_S:
        return lambda: seconds(work.call)
    if settings.device.type == "cuda":
        from triton.testing import do_bench

        block_ms = 1e3 * settings.block_s
        return lambda: (
            1e-3 * do_bench(work.call, warmup=block_ms / 4, rep=block_ms, return_mode="median")
        )
    number = max(1, round(settings.block_s / call_s))
    timer = benchmark.Timer("call()", globals={"call": work.call}, num_threads=settings.threads)
    return lambda: timer.timeit(number).mean
