"""The results of ``python -m bench.gpu_suite`` as plain data, and its short table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.case import Settings
from bench.gpu_targets import TARGETS
from bench.machine import describe_machine, describe_software
from bench.measure import Row
from bench.peaks import Peaks
from bench.report import count, duration, point_name, times
from bench.table import PLAIN, remarks

FORMAT = 2
_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}
# GPUs that the targets are about
_TARGET_GPUS = ("H100", "H200")


@dataclass
class Outcome:
    """What a section gave.

    Attributes:
        name: of the section.
        title: of its case.
        unit: of the case.
        rows: of its points and providers.
        flops: of one call, for each row.
        skipped: points that were left out, with the reason.
        seconds: that it took.
    """

    name: str
    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the JSON."""
        rows = [row.to_dict() | {"flops": flops} for row, flops in zip(self.rows, self.flops)]
        return {k: v for k, v in self.__dict__.items() if k != "flops"} | {"rows": rows}


def is_ours(provider: str) -> bool:
    """Tell whether a provider runs kernels of this package: if it fails, the run fails."""
    return provider.startswith("bitnet_triton")


@dataclass
class Run:
    """How a run goes, and what it has given so far.

    Attributes:
        settings: of the timings; its device is where everything runs.
        quick: only what is essential.
        budget_s: for everything.
        jobs: tests at a time.
        command: how it was started.
        outcomes: of the sections that have run.
        tests: what ``run_tests`` gave; None: they have not run.
        peaks: what the device can do, once it has been measured.
        broken: why nothing else can run.
    """

    settings: Settings
    quick: bool
    budget_s: float
    jobs: int = 1
    command: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    tests: dict[str, Any] | None = None
    peaks: Peaks | None = None
    broken: str = ""

    @property
    def small(self) -> bool:
        """Whether sizes are those for a CPU: to see that it runs, not to measure."""
        return self.settings.device.type == "cpu"

    @property
    def failed(self) -> bool:
        """Whether a test failed, or a kernel of this package gave something wrong when timed."""
        return bool(self.tests and self.tests["failed"]) or any(
            row.status == "failed" and is_ours(row.provider)
            for outcome in self.outcomes
            for row in outcome.rows
        )


def result(run: Run) -> dict[str, Any]:
    """Return everything about a run, as far as it has come, as plain data."""
    settings, sections = run.settings, [outcome.to_dict() for outcome in run.outcomes]
    return {
        "format": FORMAT,
        "suite": "gpu_suite",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": run.command,
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "rounds": settings.rounds,
            "block_s": settings.block_s,
            "seed": settings.seed,
            "quick": run.quick,
            "budget_s": run.budget_s,
        },
        "machine": describe_machine(settings.device),
        "software": describe_software(settings.device),
        "peaks": None if run.peaks is None else run.peaks.to_dict(),
        "tests": run.tests,
        "sections": sections,
        "targets": [] if run.small else [target.judge(sections) for target in TARGETS],
    }


def print_result(data: Mapping[str, Any], console: Console) -> None:
    """Print speeds, what failed and was skipped, then the targets and the counts."""
    for section in data["sections"]:
        if section["rows"]:
            console.print(_speed_table(section))
    for section in data["sections"]:
        for line in (*remarks(section), *_skipped(section)):
            console.print(escape(f"{section['name']}: {line}"), style="yellow", highlight=False)
    _print_targets(data, console)
    if data["tests"] is not None:
        _print_tests(data["tests"], console)
    for section in data["sections"]:
        found = Counter(row["status"] for row in section["rows"])
        found["skipped"] = len(section["skipped"])
        listed = ", ".join(f"{n} {status}" for status, n in found.items() if n)
        console.print(f"{section['name']}: {listed} in {section['seconds']:.0f} s", highlight=False)
    _print_machine(data, console)


def _speed_table(section: Mapping[str, Any]) -> Table:
    table = Table(title=escape(section["title"]), **PLAIN)
    unit = section["unit"]
    call = f"{unit}/s of at most" if unit else "a call"
    for column in ("point", "", call, "TFLOP/s", "of peak", "times as fast as"):
        table.add_column(column, no_wrap=column != "times as fast as")
    previous = None
    for row in section["rows"]:
        name = point_name(row["point"])
        table.add_row("" if name == previous else escape(name), *_cells(row, unit))
        previous = name
    return table


def _cells(row: Mapping[str, Any], unit: str) -> list[str]:
    if row["status"] != "timed":
        colour = "red" if row["status"] == "failed" else "yellow"
        return [escape(row["label"]), f"[{colour}]{row['status']}[/]"]
    median, share = row["seconds"]["median"], row["share_of_peak"]
    call, rate = duration(median), row["units"] / median
    if unit:  # with as many as the measured limits allow: the floor of the time
        call = count(rate) + ("" if share is None else f" of {count(rate / share)}")
    ratios = [
        f"{baseline} {times(r['median'])} ({times(r['p20'])}-{times(r['p80'])})"
        for baseline, r in row["ratios"].items()
        if baseline != row["provider"]
    ]
    of_peak = "" if share is None else f"{share:.0%} {row['bound']}"
    flops = f"{row['flops'] / median / 1e12:.3g}"
    return [escape(row["label"]), call, flops, of_peak, ", ".join(ratios)]


def _skipped(section: Mapping[str, Any]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for item in section["skipped"]:
        by_reason.setdefault(item["reason"], []).append(item["name"])
    return [f"{len(n)} skipped, {reason}: {'; '.join(n)}" for reason, n in by_reason.items()]


def _print_tests(tests: Mapping[str, Any], console: Console) -> None:
    for failure in tests["failed"]:
        console.print(f"[red]FAILED[/] {escape(failure['name'])}: {escape(failure['reason'])}")
    for reason, number in tests["skipped"].items():
        console.print(f"[yellow]tests: {number} skipped, {escape(reason)}[/]", highlight=False)
    found: Counter[str] = Counter()
    for counts in tests["files"].values():
        found.update(counts)
    listed = ", ".join(f"{n} {outcome}" for outcome, n in found.items()) or "nothing"
    console.print(f"tests: {listed} in {tests['seconds']:.0f} s", highlight=False)


def _print_targets(data: Mapping[str, Any], console: Console) -> None:
    if not data["targets"]:
        console.print("targets: not judged on a CPU, whose sizes only show that the suite runs")
        return
    gpu = data["machine"].get("gpu", "")
    if not any(name in gpu for name in _TARGET_GPUS):
        console.print(f"[yellow]the targets are for an H100 or H200, this is {escape(gpu)}[/]")
    table = Table(title="Targets", **PLAIN)
    for column in ("", "asked for", "measured", "", "at"):
        table.add_column(column)
    for t in data["targets"]:
        value = "" if t["value"] is None else f"{t['value']:.3g} {t['unit']}"
        verdict = f"[{_COLOURS[t['verdict']]}]{t['verdict']}[/]"
        # a quick run measures few of the points that a target is about
        at = f"{t['point']} (of {t['points']} measured)" if t["point"] else ""
        table.add_row(t["title"], f"{t['least']:g} {t['unit']}", value, verdict, at)
    console.print(table)


def _print_machine(data: Mapping[str, Any], console: Console) -> None:
    machine, versions = data["machine"], data["software"]["versions"]
    line = (
        f"{machine.get('gpu') or machine['cpu']}; torch {versions['torch']}, "
        f"triton {versions['triton']}, transformers {versions['transformers']}; seed "
        f"{data['settings']['seed']}"
    )
    if peaks := data["peaks"]:
        rates = ", ".join(f"{name} {r / 1e12:.3g}" for name, r in peaks["flops_per_s"].items())
        bandwidth = f"{peaks['read_bytes_per_s'] / 1e9:.4g} GB/s by {peaks['read_by']}"
        line += f"; measured: {bandwidth}, products {rates} TFLOP/s"
    console.print(escape(line), style="dim", highlight=False)
