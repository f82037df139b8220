"""What the kernels have to reach on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import point_name
from bench.suite.plan import Outcome, Result
from bench.suite.speed import OURS

QUANTIZED = f"{OURS}_quantized"


@dataclass(frozen=True)
class Target:
    """A bound for every matching row of a section; the worst row counts.

    Attributes:
        title: what is asked for.
        section: whose rows it is about.
        figure: reads a row; None where the row lacks it.
        least: what the figure has to be.
        unit: of the figure.
        matches: chooses points.
        provider: chooses rows.
    """

    title: str
    section: str
    figure: Callable[[Result], float | None]
    least: float
    unit: str
    matches: Callable[[Mapping[str, Any]], bool]
    provider: str = OURS

    def judge(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return "met", "missed" or "not measured", with the worst figure and its point."""
        rows = [
            row
            for outcome in outcomes
            if outcome.name == self.section
            for row in outcome.results
            if row.get("provider") == self.provider and self.matches(row["point"])
        ]
        figures = [
            (value, point_name(row["point"]))
            for row in rows
            if row["status"] == "timed" and (value := self.figure(row)) is not None
        ]
        value, point = min(figures, default=(None, ""))
        # a row that failed has no figure, and a target is not met by the others
        if value is None or len(figures) < len(rows):
            verdict = "not measured" if not rows or value is None else "missed"
        else:
            verdict = "met" if value >= self.least else "missed"
        return {
            "title": self.title, "least": self.least, "unit": self.unit, "verdict": verdict,
            "worst": value, "point": point, "points": len(figures),
        }  # fmt: skip


def ratio_to(baseline: str) -> Callable[[Result], float | None]:
    """Return what reads how many times as fast as ``baseline`` a row is."""

    def read(row: Result) -> float | None:
        found = row["ratios"].get(baseline)
        return None if found is None else found["median"]

    return read


def tflops(row: Result) -> float | None:
    """Return the TFLOP/s of a row."""
    return row["flops"] / row["seconds"]["median"] / 1e12


def bandwidth_share(row: Result) -> float | None:
    """Return the share of the measured bandwidth in per cent."""
    return 100 * row["share_of_peak"] if row["bound"] == "memory" else None


def _many(point: Mapping[str, Any]) -> bool:
    return point["M"] == 4096


def _large_gemv(point: Mapping[str, Any]) -> bool:
    return point["K"] * point["N"] >= 14336 * 4096


def _long_causal(point: Mapping[str, Any]) -> bool:
    return point["mask"] == "causal" and point["D"] == 128 and point["T"] == 16384


TARGETS = (
    Target("prefill, 4096 tokens, to cuBLAS bf16", "prefill", ratio_to("bf16"), 1.4, "x", _many),
    Target(
        "1 to 16 tokens, of the measured bandwidth", "gemv", bandwidth_share, 70, "%", _large_gemv,
        QUANTIZED,
    ),
    Target("1 to 16 tokens, to F.linear bf16", "gemv", ratio_to("bf16"), 4.0, "x", _large_gemv,
           QUANTIZED),
    Target("attention forward, head 128, causal, 16k", "attention", tflops, 395, "TFLOP/s",
           _long_causal),
    Target("attention backward, head 128, causal, 16k", "attention_backward", tflops, 300,
           "TFLOP/s", _long_causal),
)  # fmt: skip
