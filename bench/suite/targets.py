"""What the kernels have to reach on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import point_name
from bench.suite.plan import Outcome, Result
from bench.suite.speed import OURS, is_ours

QUANTIZED = f"{OURS}_quantized"


@dataclass(frozen=True)
class Target:
    """A bound for every matching row of a section; the worst row counts, or the best of ours.

    Attributes:
        title: what is asked for.
        section: whose rows it is about.
        figure: reads a row; None where the row lacks it.
        least: what the figure has to be.
        unit: of the figure.
        matches: chooses points.
        provider: chooses rows; None: the best row of any provider of ours counts.
    """

    title: str
    section: str
    figure: Callable[[Result], float | None]
    least: float
    unit: str
    matches: Callable[[Mapping[str, Any]], bool]
    provider: str | None = OURS

    def judge(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return "met", "missed" or "not measured", with the figure that counts and its point."""
        rows = [
            row
            for outcome in outcomes
            if outcome.name == self.section
            for row in outcome.results
            if "point" in row and self._is_about(row)
        ]
        figures = [
            (value, point_name(row["point"]))
            for row in rows
            if row["status"] == "timed" and (value := self.figure(row)) is not None
        ]
        best = self.provider is None
        value, point = (max if best else min)(figures, default=(None, ""))
        # a row that failed has no figure, and a target for all rows is not met by the others
        if value is None or (len(figures) < len(rows) and not best):
            verdict = "not measured" if not rows or value is None else "missed"
        else:
            verdict = "met" if value >= self.least else "missed"
        return {
            "title": self.title, "least": self.least, "unit": self.unit, "verdict": verdict,
            "value": value, "point": point, "points": len(figures),
        }  # fmt: skip

    def _is_about(self, row: Result) -> bool:
        ours = is_ours(row["provider"]) and self.provider in (None, row["provider"])
        return ours and self.matches(row["point"])


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


def units_per_s(row: Result) -> float | None:
    """Return how many units, such as tokens, a row makes in a second."""
    return row["units"] / row["seconds"]["median"]


def _many(point: Mapping[str, Any]) -> bool:
    return point["M"] == 4096


def _every(_: Mapping[str, Any]) -> bool:
    return True


def _large(point: Mapping[str, Any]) -> bool:
    return point["K"] * point["N"] >= 14336 * 4096


def _one_token(point: Mapping[str, Any]) -> bool:
    return point["M"] == 1 and _large(point)


def _few_tokens(point: Mapping[str, Any]) -> bool:
    return point["M"] > 1 and _large(point)


def _long_causal(point: Mapping[str, Any]) -> bool:
    return point["mask"] == "causal" and point["D"] == 128 and point["T"] == 16384


def _one_sequence(point: Mapping[str, Any]) -> bool:
    return point["B"] == 1


TARGETS = (
    Target("prefill of 4096 tokens, to cuBLAS bf16", "prefill", ratio_to("bf16"), 1.4, "x",
           _many, QUANTIZED),
    Target("prefill of 4096 tokens that quantises them as well", "prefill", ratio_to("bf16"), 1.4,
           "x", _many),
    Target("1 token, of the measured bandwidth", "gemv", bandwidth_share, 70, "%", _one_token,
           QUANTIZED),
    Target("2 to 16 tokens, of the measured bandwidth", "gemv", bandwidth_share, 70, "%",
           _few_tokens, QUANTIZED),
    Target("1 token, to F.linear bf16", "gemv", ratio_to("bf16"), 4.0, "x", _one_token, QUANTIZED),
    Target("2 to 16 tokens, to F.linear bf16", "gemv", ratio_to("bf16"), 4.0, "x", _few_tokens,
           QUANTIZED),
    Target("training step of a linear, at most 0.8 of the time in bf16", "training",
           ratio_to("bf16"), 1.25, "x", _every),
    Target("attention forward, head 128, causal, 16k", "attention", tflops, 395, "TFLOP/s",
           _long_causal),
    Target("attention backward, head 128, causal, 16k", "attention_backward", tflops, 300,
           "TFLOP/s", _long_causal),
    Target("2B-4T decoding, one sequence", "model", units_per_s, 400, "tokens/s", _one_sequence,
           None),
)  # fmt: skip
