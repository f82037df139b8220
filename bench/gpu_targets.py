"""What the kernels have to reach on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import point_name

_QUANTIZED = "bitnet_triton_quantized"
Data = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound for every matching row of a section; the worst row counts, or the best of ours.

    Attributes:
        title: what is asked for.
        section: whose rows it is about.
        provider: chooses rows; None: the best row of any provider of ours counts.
        least: what the figure has to be.
        unit: of the figure.
        figure: reads a row; None where the row lacks it.
        matches: chooses points.
    """

    title: str
    section: str
    provider: str | None
    least: float
    unit: str
    figure: Callable[[Data], float | None]
    matches: Callable[[Data], bool] = lambda _: True

    def judge(self, sections: Sequence[Data]) -> dict[str, Any]:
        """Return "met", "missed" or "not measured", with the figure that counts and its point."""
        rows = [
            row
            for section in sections
            if section["name"] == self.section
            for row in section["rows"]
            if row["provider"].startswith("bitnet_triton")
            and self.provider in (None, row["provider"])
            and self.matches(row["point"])
        ]
        figures = [
            (value, point_name(row["point"]))
            for row in rows
            if row["status"] == "timed" and (value := self.figure(row)) is not None
        ]
        best = self.provider is None
        value, point = (max if best else min)(figures, default=(None, ""))
        if value is None:
            verdict = "not measured"
        # a row that failed has no figure, and a target for all rows is not met by the others
        elif value < self.least or (len(figures) < len(rows) and not best):
            verdict = "missed"
        else:
            verdict = "met"
        return {
            "title": self.title, "least": self.least, "unit": self.unit, "verdict": verdict,
            "value": value, "point": point, "points": len(figures),
        }  # fmt: skip


def ratio_to(baseline: str) -> Callable[[Data], float | None]:
    """Return what reads how many times as fast as ``baseline`` a row is."""
    return lambda row: row["ratios"].get(baseline, {}).get("median")


def _tflops(row: Data) -> float:
    return row["flops"] / row["seconds"]["median"] / 1e12


def _bandwidth_share(row: Data) -> float | None:
    return 100 * row["share_of_peak"] if row["bound"] == "memory" else None


def _rate(row: Data) -> float:
    return row["units"] / row["seconds"]["median"]


def _large(rows: Callable[[int], bool]) -> Callable[[Data], bool]:
    return lambda point: rows(point["M"]) and point["K"] * point["N"] >= 14336 * 4096


def _long_causal(point: Data) -> bool:
    return point["mask"] == "causal" and point["D"] == 128 and point["T"] == 16384


_one, _few = _large(lambda M: M == 1), _large(lambda M: M > 1)
_bf16 = ratio_to("torch_bf16")
TARGETS = (
    Target("prefill of 4096 tokens, to cuBLAS bf16", "prefill", _QUANTIZED, 1.4, "x", _bf16),
    Target("prefill of 4096 tokens that quantises them as well", "prefill", "bitnet_triton", 1.4,
           "x", _bf16),
    Target("1 token, of the measured bandwidth", "gemv", _QUANTIZED, 70, "%", _bandwidth_share,
           _one),
    Target("2 to 16 tokens, of the measured bandwidth", "gemv", _QUANTIZED, 70, "%",
           _bandwidth_share, _few),
    Target("1 token, to F.linear bf16", "gemv", _QUANTIZED, 4.0, "x", _bf16, _one),
    Target("2 to 16 tokens, to F.linear bf16", "gemv", _QUANTIZED, 4.0, "x", _bf16, _few),
    Target("training step of a linear, at most 0.8 of the time in bf16", "training",
           "bitnet_triton_recorded", 1.25, "x", ratio_to("torch_bf16_recorded")),
    Target("attention forward, head 128, causal, 16k", "attention", "bitnet_triton", 395,
           "TFLOP/s", _tflops, _long_causal),
    Target("attention backward, head 128, causal, 16k", "attention_backward", "bitnet_triton", 300,
           "TFLOP/s", _tflops, _long_causal),
    Target("2B-4T decoding, one sequence", "model", None, 400, "tokens/s", _rate,
           lambda point: point["B"] == 1),
)  # fmt: skip
