"""The results of a run as plain data, and its short table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.machine import describe_machine, describe_software
from bench.report import count, duration, point_name, times
from bench.suite.plan import Outcome, Plan, Result
from bench.suite.targets import TARGETS

FORMAT = 1
_PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}
# GPUs that the targets are about
_TARGET_GPUS = ("H100", "H200")


def result(
    plan: Plan, command: str, budget_s: float, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Return everything about a run, as far as it has come, as plain data."""
    settings = plan.settings
    return {
        "format": FORMAT,
        "suite": "gpu_suite",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "rounds": settings.rounds,
            "block_s": settings.block_s,
            "seed": settings.seed,
            "quick": plan.quick,
            "budget_s": budget_s,
        },
        "machine": describe_machine(plan.device),
        "software": describe_software(plan.device),
        "peaks": None if plan.peaks is None else plan.peaks.to_dict(),
        "sections": [
            {
                "name": o.name, "title": o.title, "kind": o.kind, "seconds": o.seconds,
                "results": o.results, "skipped": o.skipped,
            }
            for o in outcomes
        ],
        "targets": [] if plan.small else [target.judge(outcomes) for target in TARGETS],
    }  # fmt: skip


def print_result(data: dict[str, Any], console: Console) -> None:
    """Print speeds, what failed and was skipped, then the targets and the counts."""
    for section in data["sections"]:
        if section["kind"] == "speed" and section["results"]:
            console.print(_speed_table(section))
    for section in data["sections"]:
        _print_remarks(section, console)
    _print_targets(data, console)
    for section in data["sections"]:
        console.print(_count(section), highlight=False)
    _print_machine(data, console)


def _speed_table(section: dict[str, Any]) -> Table:
    table = Table(
        title=escape(section["title"]), title_justify="left", title_style="bold", **_PLAIN
    )
    columns = ["point", "", "a call", "TFLOP/s", "of peak", "times as fast as"]
    unit = next((row["unit"] for row in section["results"] if row.get("unit")), "")
    if unit:
        columns[2] = f"{unit}/s of at most"
    for column in columns:
        table.add_column(column, no_wrap=column != "times as fast as")
    previous = None
    for row in section["results"]:
        name = point_name(row["point"]) if "point" in row else row["name"]
        table.add_row("" if name == previous else escape(name), *_cells(row))
        previous = name
    return table


def _cells(row: Result) -> list[str]:
    if row["status"] != "timed":
        colour = "red" if row["status"] == "failed" else "yellow"
        return [escape(row.get("label", "")), f"[{colour}]{row['status']}[/]"]
    median, share = row["seconds"]["median"], row["share_of_peak"]
    ratios = [
        f"{baseline} {times(r['median'])} ({times(r['p20'])}-{times(r['p80'])})"
        for baseline, r in row["ratios"].items()
        if baseline != row["provider"]
    ]
    return [
        escape(row["label"]),
        _rate(row) if row["unit"] else duration(median / row["units"]),
        f"{row['flops'] / median / 1e12:.3g}",
        "" if share is None else f"{share:.0%} {row['bound']}",
        ", ".join(ratios),
    ]


def _rate(row: Result) -> str:
    """Return units a second, and as many as the measured limits allow: the floor of the time."""
    rate, share = row["units"] / row["seconds"]["median"], row["share_of_peak"]
    return count(rate) if share is None else f"{count(rate)} of {count(rate / share)}"


def _print_remarks(section: dict[str, Any], console: Console) -> None:
    for r in section["results"]:
        if r["status"] == "failed":
            what = "peer failed" if r.get("peer") else "FAILED"
            console.print(f"[red]{what}[/] {escape(r['name'])}: {escape(r['reason'])}")
    missing = {(r["label"], r["reason"]) for r in section["results"] if r["status"] == "missing"}
    for label, reason in sorted(missing):
        console.print(f"[yellow]missing[/] {escape(section['name'])}: {escape(label)}: {reason}")
    by_reason: dict[str, list[str]] = {}
    for item in section["skipped"]:
        by_reason.setdefault(item["reason"], []).append(item["name"])
    for reason, names in by_reason.items():
        listed = "; ".join(names)
        text = f"{section['name']}: {len(names)} skipped, {reason}: {listed}"
        console.print(f"[yellow]{escape(text)}[/]", highlight=False)


def _print_targets(data: dict[str, Any], console: Console) -> None:
    if not data["targets"]:
        console.print("targets: not judged on a CPU, whose sizes only show that the suite runs")
        return
    gpu = data["machine"].get("gpu", "")
    if not any(name in gpu for name in _TARGET_GPUS):
        console.print(f"[yellow]the targets are for an H100 or H200, this is {escape(gpu)}[/]")
    table = Table(title="Targets", title_justify="left", title_style="bold", **_PLAIN)
    for column in ("", "asked for", "measured", "", "at"):
        table.add_column(column)
    for t in data["targets"]:
        value = "" if t["value"] is None else f"{t['value']:.3g} {t['unit']}"
        verdict = f"[{_COLOURS[t['verdict']]}]{t['verdict']}[/]"
        # a quick run measures few of the points that a target is about
        at = f"{t['point']} (of {t['points']} measured)" if t["point"] else ""
        table.add_row(t["title"], f"{t['least']:g} {t['unit']}", value, verdict, at)
    console.print(table)


def _count(section: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for r in section["results"]:
        counts[r["status"]] = counts.get(r["status"], 0) + 1
    if section["skipped"]:
        counts["skipped"] = len(section["skipped"])
    listed = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{section['name']}: {listed or 'nothing'} in {section['seconds']:.0f} s"


def _print_machine(data: dict[str, Any], console: Console) -> None:
    machine, versions = data["machine"], data["software"]["versions"]
    line = (
        f"{machine.get('gpu') or machine['cpu']}; torch {versions['torch']}, "
        f"triton {versions['triton']}, transformers {versions['transformers']}; seed "
        f"{data['settings']['seed']}"
    )
    if data["peaks"]:
        rates = data["peaks"]["flops_per_s"].items()
        listed = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates)
        line += (
            f"; measured: {data['peaks']['read_bytes_per_s'] / 1e9:.4g} GB/s by "
            f"{data['peaks']['read_by']}, products {listed} TFLOP/s"
        )
    console.print(escape(line), style="dim", highlight=False)
