"""The one runner: check first, warm up, then time the providers in turns.

Machines are shared and clocks change, so providers are compared inside a round, where they ran
right after each other: the ratio to a baseline is taken round by round and reported with its
spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import benchmark

from bench.case import Case, Outputs, PeerMissingError, Point, Provider, Settings, Work
from bench.memory import peak_extra_bytes
from bench.peaks import Peaks, Reads, best_possible_seconds
from bench.turns import LONG_CALL_S, Advance, seconds, time_in_turns

# Takes its turns beside the providers
_READS = "read bandwidth"


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
    read_bytes_per_s: dict[str, float] | None = None  # of plain reads, in the same rounds
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
    """Return how many times faster ``other`` was than ``baseline``, in the rounds of both."""
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
    reads: Reads | None = None,
) -> list[Row]:
    """Check and time all providers at one point of the grid.

    Args:
        case: the workload.
        point: one element of ``case.grid``.
        providers: those that take part.
        settings: how to measure.
        peaks: what the machine can do, for the share of it.
        advance: is told what happens, for a progress display.
        reads: takes its turns beside the providers; without it, ``peaks`` tell the bandwidth.
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
    cached = point.get("cache") == "hot"  # neither limit tells anything then
    if reads is not None and works and not cached:
        works[_READS] = Work(reads.call, compiles=False)
        call_s[_READS] = seconds(reads.call)
    times = {
        name: [taken / works[name].calls for taken in rounds]
        for name, rounds in time_in_turns(works, call_s, settings, advance).items()
    }
    flops = case.flops(**point)
    for row in rows:
        if row.status != "timed":
            continue
        row.rounds = times[row.provider]
        row.seconds = spread(row.rounds)
        row.ratios = {b: ratios(times[b], row.rounds) for b in case.baselines if b in times}
        if peaks is not None and not cached:
            beside = [reads.held_bytes / s for s in times[_READS]] if _READS in times else []
            own = row.details.get("flops", flops)
            _compare_with_limits(row, peaks, beside, own, providers[row.provider].arithmetic)
    return rows


def _compare_with_limits(
    row: Row, peaks: Peaks, beside: Sequence[float], flops: float, arithmetic: str
) -> None:
    """Fill in the share of what the machine allows, round by round where reads ran beside."""
    row.read_bytes_per_s = spread(beside) if beside else None
    possible = [
        best_possible_seconds(peaks, row.read_bytes, flops, arithmetic, bandwidth)
        for bandwidth in beside or [peaks.read_bytes_per_s] * len(row.rounds)
    ]
    shares = [least / taken for (least, _), taken in zip(possible, row.rounds)]
    row.share_of_peak = spread(shares)["median"]
    _, row.bound = max(possible[: len(shares)])


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
            wanted = expected if work.expected is None else work.expected()
            row.error = relative_error(output, wanted)
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


def _warm_up(row: Row, work: Work, settings: Settings) -> float:
    """Run ``work`` until it is warm; note its memory; return about how long a call takes."""
    if not work.compiles or row.first_call_s > settings.budget_s:
        return row.first_call_s
    with torch.set_grad_enabled(work.grad):
        start = benchmark.timer()
        row.peak_extra_bytes = peak_extra_bytes(work.call, settings.device)
        call_s = benchmark.timer() - start
        if call_s < 4 * LONG_CALL_S:
            call_s = min(seconds(work.call) for _ in range(3))
    return call_s
