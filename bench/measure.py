"""The one runner: check first, warm up, then time the providers in turns.

Machines are shared and clocks change, so providers are compared inside a round, where they ran
right after each other: the ratio to a baseline is taken round by round and reported with its
spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import benchmark

from bench.case import Case, Outputs, PeerMissingError, Point, Provider, Settings, Work
from bench.memory import peak_extra_bytes
from bench.peaks import Peaks, best_possible_seconds

# A longer call is timed by itself: it does not fit the cache, and its own length hides the timer
_LONG_CALL_S = 0.25
_MIN_ROUNDS = 3

Advance = Callable[[str], None]


@dataclass
class Row:
    """What was found out about one provider at one point; plain data, written to the JSON."""

    point: dict[str, Any]
    provider: str
    label: str
    status: str = "timed"  # or "failed", "missing"
    reason: str = ""
    note: str = ""
    error: float | None = None
    tolerance: float | None = None
    build_s: float | None = None
    first_call_s: float | None = None  # with compilation
    peak_extra_bytes: int | None = None
    read_bytes: int = 0
    units: int = 1
    seconds: dict[str, float] | None = None
    rounds: list[float] = field(default_factory=list)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    share_of_peak: float | None = None
    bound: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    p20, median, p80 = np.quantile(np.asarray(values, dtype=float), [0.2, 0.5, 0.8])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def ratios(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return how many times faster ``other`` was than ``baseline``, round by round."""
    if len(baseline) != len(other):
        raise ValueError(f"`other`: expected {len(baseline)} rounds, got {len(other)}")
    return spread([b / o for b, o in zip(baseline, other)])


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Return the largest relative RMS error among the outputs; infinite where not finite.

    Raises:
        ValueError: names or shapes differ.
    """
    actual = actual if isinstance(actual, Mapping) else {"output": actual}
    expected = expected if isinstance(expected, Mapping) else {"output": expected}
    if actual.keys() != expected.keys():
        raise ValueError(f"expected outputs {', '.join(expected)}, got {', '.join(actual)}")
    worst = 0.0
    for name, wanted in expected.items():
        if actual[name].shape != wanted.shape:
            raise ValueError(
                f"{name}: expected {list(wanted.shape)}, got {list(actual[name].shape)}"
            )
        difference = (actual[name].float() - wanted.float()).norm() / wanted.float().norm()
        value = float(difference)
        worst = max(worst, value if np.isfinite(value) else float("inf"))
    return worst


def measure_point(
    case: Case,
    point: Point,
    providers: Mapping[str, Provider],
    settings: Settings,
    peaks: Peaks | None = None,
    advance: Advance = lambda _: None,
) -> list[Row]:
    """Check and time all providers at one point of the grid.

    Args:
        case: the workload.
        point: one element of ``case.grid``.
        providers: those that take part.
        settings: how to measure.
        peaks: what the machine can do, for the share of it.
        advance: is told what happens, for a progress display.
    """
    torch.set_num_threads(settings.threads)
    inputs = case.inputs(**point, settings=settings)
    advance("reference")
    with torch.no_grad():
        expected = case.reference(inputs)

    rows, works = [], {}
    for name, provider in providers.items():
        advance(f"check {provider.label}")
        row = Row(dict(point), name, provider.label, note=provider.note)
        rows.append(row)
        work = _checked(row, provider, inputs, expected, settings)
        if work is not None:
            works[name] = work
    del expected

    call_s = {}
    for row in rows:
        if row.provider in works:
            advance(f"warm up {row.label}")
            call_s[row.provider] = _warm_up(row, works[row.provider], settings)
    times = time_in_turns(works, call_s, settings, advance)
    flops = case.flops(**point)
    for row in rows:
        if row.status != "timed":
            continue
        row.rounds = times[row.provider]
        row.seconds = spread(row.rounds)
        row.ratios = {b: ratios(times[b], row.rounds) for b in case.baselines if b in times}
        if peaks is not None and point.get("cache") != "hot":
            arithmetic = providers[row.provider].arithmetic
            possible, row.bound = best_possible_seconds(peaks, row.read_bytes, flops, arithmetic)
            row.share_of_peak = possible / row.seconds["median"]
    return rows


def _checked(
    row: Row, provider: Provider, inputs: Any, expected: Outputs, settings: Settings
) -> Work | None:
    """Build, compile and check a provider; fill ``row``; return it only if it may be timed."""
    row.tolerance = provider.tolerance
    start = benchmark.timer()
    try:
        work = provider.build(inputs)
        row.build_s = benchmark.timer() - start
        start = benchmark.timer()
        with torch.set_grad_enabled(work.grad):
            output = (work.output or work.call)()
        row.first_call_s = benchmark.timer() - start
        if provider.tolerance is not None:
            row.error = relative_error(output, expected)
    except PeerMissingError as missing:
        row.status, row.reason = "missing", str(missing)
        return None
    except Exception as error:  # whatever a provider raises belongs in the report
        message = str(error).strip().splitlines() or [""]
        row.status, row.reason = "failed", f"{type(error).__name__}: {message[0]}"
        return None
    if provider.tolerance is not None and not row.error <= provider.tolerance:
        row.status = "failed"
        row.reason = f"relative error {row.error:.2g} exceeds {provider.tolerance:.2g}"
        return None
    row.read_bytes, row.units, row.details = work.read_bytes, work.units, dict(work.details)
    return work


def _seconds(call: Callable[[], Any]) -> float:
    start = benchmark.timer()
    call()
    return benchmark.timer() - start


def _warm_up(row: Row, work: Work, settings: Settings) -> float:
    """Run ``work`` until it is warm; note its memory; return about how long a call takes."""
    with torch.set_grad_enabled(work.grad):
        start = benchmark.timer()
        row.peak_extra_bytes = peak_extra_bytes(work.call, settings.device)
        call_s = benchmark.timer() - start
        if call_s < 4 * _LONG_CALL_S:
            call_s = min(_seconds(work.call) for _ in range(3))
    return call_s


def time_in_turns(
    works: Mapping[str, Work],
    call_s: Mapping[str, float],
    settings: Settings,
    advance: Advance = lambda _: None,
) -> dict[str, list[float]]:
    """Return the seconds of one call for each provider and round.

    Every round starts with another provider, so that none always follows the same one.

    Args:
        works: the providers that are timed.
        call_s: about how long a call of each takes.
        settings: how to measure.
        advance: is told about every round.
    """
    timers = {name: _timer(work, call_s[name], settings) for name, work in works.items()}
    turn_s = sum(max(call_s[name], settings.block_s) for name in works)
    affordable = int(settings.budget_s / turn_s) if turn_s else settings.rounds
    rounds = min(settings.rounds, max(_MIN_ROUNDS, affordable))
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        advance(f"round {i + 1} of {rounds}")
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            with torch.set_grad_enabled(works[name].grad):
                times[name].append(timers[name]())
    return times


def _timer(work: Work, call_s: float, settings: Settings) -> Callable[[], float]:
    """Return a function that runs one turn and gives the seconds of a call."""
    if settings.device.type == "cuda":
        from triton.testing import do_bench

        block_ms = 1e3 * settings.block_s
        return lambda: (
            1e-3 * do_bench(work.call, warmup=block_ms / 4, rep=block_ms, return_mode="median")
        )
    if call_s >= _LONG_CALL_S:
        return lambda: _seconds(work.call)
    number = max(1, round(settings.block_s / call_s))
    timer = benchmark.Timer("call()", globals={"call": work.call}, num_threads=settings.threads)
    return lambda: timer.timeit(number).mean
