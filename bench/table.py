"""Results as tables for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.report import (
    axes_of,
    count,
    duration,
    instructions_line,
    point_name,
    setup_line,
    size,
    times,
)

# Narrower terminals get fewer columns
_DETAILED_WIDTH = 130
_NARROW_BASELINES = 2
_DETAILS = (
    "bound", "moves per\n{unit}", "reads\nbeside", "p20 - p80", "first call", "memory\nof a call",
    "error",
)  # fmt: skip
PLAIN: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "show_edge": False,
    "title_style": "bold cyan",
    "title_justify": "left",
}


def print_table(data: dict[str, Any], console: Console) -> None:
    """Print a result, the same from a fresh run and from a file; more columns on a wide screen."""
    console.print(f"[bold]{escape(data['title'])}[/]", highlight=False)
    axes = axes_of(data)
    rows = data["rows"]
    for point in _distinct(_without(row["point"], axes) for row in rows):
        here = [row for row in rows if _without(row["point"], axes) == point]
        console.print(_table(point, here, axes, data, console.width >= _DETAILED_WIDTH))
    if data["curve"]:
        for line in (*_steps_up(data), *_wins_from(data)):
            console.print(escape(line), highlight=False)
    elif data["unit"] and len(_distinct(row["point"] for row in rows)) > 1:
        console.print(_overview(data))
    for line in (
        *remarks(data), setup_line(data), instructions_line(data), *peaks_lines(data),
    ):  # fmt: skip
        console.print(escape(line), style="dim", highlight=False)


def _without(point: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key not in keys}


def _distinct(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({point_name(point): point for point in points}.values())


def _table(
    point: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    axes: Sequence[str],
    data: dict[str, Any],
    detailed: bool,
) -> Table:
    labels = {row["provider"]: row["label"] for row in data["rows"]}
    baselines = [name for name in data["baselines"] if name in labels]
    if not detailed:
        baselines = baselines[:_NARROW_BASELINES]
    table = Table(title=escape(point_name(point)), **PLAIN)
    table.add_column("", min_width=16)
    for axis in axes:
        table.add_column(axis, justify="right")
    table.add_column(f"{data['unit']}/s" if data["unit"] else "median", min_width=9)
    for baseline in baselines:
        name = escape(labels[baseline])
        table.add_column(f"times as fast as\n{name}", min_width=17, no_wrap=True)
    table.add_column("of\npeak", no_wrap=True, min_width=4)
    for column in _DETAILS if detailed else ():
        table.add_column(column.format(unit=data["unit"][:-1] or "call"), min_width=8)
    for row in rows:
        settings = [str(row["point"][axis]) for axis in axes]
        cells = _cells(row, data["unit"], baselines, detailed)
        table.add_row(escape(row["label"]), *settings, *cells)
    return table


def _cells(row: dict[str, Any], unit: str, baselines: Sequence[str], detailed: bool) -> list[str]:
    if row["status"] != "timed":
        colour = "red" if row["status"] == "failed" else "yellow"
        return [f"[{colour}]{row['status']}[/]"]
    share, beside = row["share_of_peak"], row["read_bytes_per_s"]
    median = _rate(row) if unit else duration(row["seconds"]["median"])
    cells = [median, *(_ratio(row, baseline) for baseline in baselines)]
    cells.append("" if share is None else f"{share:.0%}")
    if detailed:
        cells += [
            row["bound"],
            size(row["read_bytes"] / row["units"]),
            "" if beside is None else f"{beside['median'] / 1e9:.1f} GB/s",
            _spread(row, unit),
            duration(row["first_call_s"]),
            size(row["peak_extra_bytes"]),
            "" if row["error"] is None else f"{row['error']:.1e}",
        ]
    return cells


def _spread(row: dict[str, Any], unit: str) -> str:
    low, high = row["seconds"]["p20"], row["seconds"]["p80"]
    if unit:
        return f"{count(row['units'] / high)} - {count(row['units'] / low)}"
    return f"{duration(low)} - {duration(high)}"


def _ratio(row: dict[str, Any], baseline: str) -> str:
    found = row["ratios"].get(baseline)
    if found is None:
        return ""
    if row["provider"] == baseline:
        return "1"
    limit = row["details"].get("at_most", {}).get(baseline)
    of = "" if limit is None else f" of {times(limit)}"
    return f"[bold]{times(found['median'])}[/]{of} ({times(found['p20'])}-{times(found['p80'])})"


def _overview(data: dict[str, Any]) -> Table:
    """Return all speeds side by side: a row a provider, a column a point."""
    points = _distinct(row["point"] for row in data["rows"])
    table = Table(title=f"{data['unit']} per second", **PLAIN)
    table.add_column("", min_width=16)
    for point in points:
        table.add_column(escape("\n".join(f"{k} {v}" for k, v in point.items())), justify="right")
    for label in dict.fromkeys(row["label"] for row in data["rows"]):
        cells = [
            _rate(row)
            for point in points
            for row in data["rows"]
            if row["label"] == label and row["point"] == point
        ]
        table.add_row(escape(label), *cells)
    return table


def _steps_up(data: dict[str, Any]) -> list[str]:
    """Say for each provider where the time of a unit rises along the curve, if it does."""
    key, lines = data["curve"], []
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in data["rows"]:
        if row["status"] == "timed":
            name = row["label"], point_name(_without(row["point"], [key]))
            seconds = row["seconds"]["median"] / row["units"]
            groups.setdefault(name, []).append((row["point"][key], seconds))
    for (label, rest), points in groups.items():
        points.sort()
        rises = [
            f"{key}={after[0]} (+{after[1] / before[1] - 1:.0%})"
            for before, after in itertools.pairwise(points)
            if after[1] > before[1]
        ]
        told = f"rises at {', '.join(rises)}" if rises else "falls all along"
        lines.append(f"{label}, {rest}: the time of one of the {data['unit']} {told}")
    return lines


def _wins_from(data: dict[str, Any]) -> list[str]:
    """Say from where on along the curve each provider is faster than each baseline."""
    key, lines = data["curve"], []
    timed = [row for row in data["rows"] if row["status"] == "timed"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in timed:
        rest = point_name(_without(row["point"], [key]))
        groups.setdefault((row["label"], rest), []).append(row)
    labels = {row["provider"]: row["label"] for row in timed}
    for (label, rest), rows in groups.items():
        for baseline in data["baselines"]:
            met = [row for row in rows if baseline in row["ratios"]]
            if not met or met[0]["provider"] == baseline:
                continue
            slower = [r["point"][key] for r in met if r["ratios"][baseline]["median"] <= 1]
            faster = [r["point"][key] for r in met if not slower or r["point"][key] > max(slower)]
            told = f"from {key}={min(faster)} on" if faster else "nowhere"
            lines.append(f"{label}, {rest}: faster than {labels[baseline]} {told}")
    return lines


def _rate(row: dict[str, Any]) -> str:
    if row["status"] != "timed":
        return row["status"]
    return count(row["units"] / row["seconds"]["median"])


def remarks(data: dict[str, Any]) -> list[str]:
    """Return what the providers do otherwise, and why some were not timed; each once."""
    notes = [f"{row['label']}: {row['note']}" for row in data["rows"] if row["note"]]
    reasons = [
        f"{row['label']} {row['status']}: {row['reason']}"
        for row in data["rows"]
        if row["status"] != "timed"
    ]
    return list(dict.fromkeys(notes + reasons))


def peaks_lines(data: dict[str, Any]) -> list[str]:
    """Return the measured limits, a line for each number of threads."""
    loads = data["load_average"]
    lines = []
    for peak in data["peaks"]:
        rates = ", ".join(f"{k} {rate / 1e9:.0f}" for k, rate in peak["flops_per_s"].items())
        lines.append(
            f"measured in this run with threads={peak['threads']}: "
            f"reads {peak['read_bytes_per_s'] / 1e9:.1f} GB/s, products {rates} Gop/s"
        )
    return [*lines, f"load average {loads['before']} before, {loads['after']} after"]
