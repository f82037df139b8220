"""Results: a table for the terminal, and the JSON that every plot and figure comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.case import Case, Settings
from bench.machine import command_line, describe_machine, describe_software
from bench.measure import Row
from bench.peaks import Peaks

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
# Narrower terminals get fewer columns
_DETAILED_WIDTH = 130
_DETAILS = ("bound", "reads per\n{unit}", "p20 - p80", "first call", "memory\nof a call", "error")
_PLAIN: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "show_edge": False,
    "title_style": "bold cyan",
}


def result(
    case: Case,
    rows: Sequence[Row],
    settings: Settings,
    peaks: Peaks,
    loads: tuple[float | None, float | None],
) -> dict[str, Any]:
    """Return everything about a run as plain data.

    Args:
        case: what was measured.
        rows: of all points.
        settings: how it was measured.
        peaks: measured in the same run.
        loads: the machine's load before and after.
    """
    return {
        "format": FORMAT,
        "case": case.name,
        "title": case.title,
        "unit": case.unit,
        "baselines": list(case.baselines),
        "panels": [list(keys) for keys in case.panels],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "threads": settings.threads,
            "rounds": settings.rounds,
            "block_s": settings.block_s,
            "budget_s": settings.budget_s,
            "seed": settings.seed,
        },
        "machine": describe_machine(settings.device),
        "load_average": {"before": loads[0], "after": loads[1]},
        "software": describe_software(settings.device),
        "peaks": peaks.to_dict(),
        "rows": [row.to_dict() for row in rows],
    }


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write a result; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        ValueError: the file is no result of these benchmarks.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or "rows" not in data:
        raise ValueError(f"{path.name}: no result of these benchmarks (format {FORMAT})")
    return data


def duration(seconds: float) -> str:
    """Return a time with three digits and a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def size(count: float | None) -> str:
    """Return a number of bytes with a unit."""
    if count is None:
        return ""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def point_name(point: Mapping[str, Any]) -> str:
    """Return a point as "M=1 K=2560"."""
    return " ".join(f"{key}={value}" for key, value in point.items())


def speed(row: dict[str, Any], unit: str) -> str:
    """Return the median of a row: a rate where the case counts units, else a time."""
    median = row["seconds"]["median"]
    return f"{row['units'] / median:.3g} {unit}/s" if unit else duration(median)


def _spread(row: dict[str, Any], unit: str) -> str:
    low, high = row["seconds"]["p20"], row["seconds"]["p80"]
    if unit:
        return f"{row['units'] / high:.3g} - {row['units'] / low:.3g}"
    return f"{duration(low)} - {duration(high)}"


def times(ratio: float) -> str:
    """Return a ratio with as many digits as mean something."""
    if ratio >= 100:
        return f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def _ratio(row: dict[str, Any], baseline: str) -> str:
    found = row["ratios"].get(baseline)
    if found is None:
        return ""
    if row["provider"] == baseline:
        return "1"
    return f"[bold]{times(found['median'])}[/] ({times(found['p20'])}-{times(found['p80'])})"


def _cells(
    row: dict[str, Any], data: dict[str, Any], baselines: Sequence[str], detailed: bool
) -> list[str]:
    label = escape(row["label"])
    if row["status"] != "timed":
        colour = "red" if row["status"] == "failed" else "yellow"
        return [label, f"[{colour}]{row['status']}[/]"]
    share = row["share_of_peak"]
    cells = [label, speed(row, data["unit"])]
    cells += [_ratio(row, baseline) for baseline in baselines]
    cells.append("" if share is None else f"{share:.0%}")
    if detailed:
        cells += [
            row["bound"],
            size(row["read_bytes"] / row["units"]),
            _spread(row, data["unit"]),
            duration(row["first_call_s"]),
            size(row["peak_extra_bytes"]),
            f"{row['error']:.1e}",
        ]
    return cells


def print_table(data: dict[str, Any], console: Console) -> None:
    """Print a result, the same from a fresh run and from a file; more columns on a wide screen."""
    console.print(f"[bold]{escape(data['title'])}[/]", highlight=False)
    detailed = console.width >= _DETAILED_WIDTH
    labels = {row["provider"]: row["label"] for row in data["rows"]}
    baselines = [name for name in data["baselines"] if name in labels]
    for point in _distinct(row["point"] for row in data["rows"]):
        table = Table(title=escape(point_name(point)), title_justify="left", **_PLAIN)
        table.add_column("", min_width=16)
        table.add_column("median", min_width=9)
        for baseline in baselines:
            name = escape(labels[baseline])
            table.add_column(f"times as fast as\n{name}", min_width=17, no_wrap=True)
        table.add_column("of\npeak", no_wrap=True, min_width=4)
        for column in _DETAILS if detailed else ():
            table.add_column(column.format(unit=data["unit"][:-1] or "call"), min_width=8)
        for row in data["rows"]:
            if row["point"] == point:
                table.add_row(*_cells(row, data, baselines, detailed))
        console.print(table)
    for line in (*remarks(data), setup_line(data), peaks_line(data)):
        console.print(escape(line), style="dim", highlight=False)


def _distinct(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({point_name(point): point for point in points}.values())


def remarks(data: dict[str, Any]) -> list[str]:
    """Return what the providers do otherwise, and why some were not timed; each once."""
    notes = [f"{row['label']}: {row['note']}" for row in data["rows"] if row["note"]]
    reasons = [
        f"{row['label']} {row['status']}: {row['reason']}"
        for row in data["rows"]
        if row["status"] != "timed"
    ]
    return list(dict.fromkeys(notes + reasons))


def setup_line(data: dict[str, Any]) -> str:
    """Return machine and versions in one line."""
    machine, versions = data["machine"], data["software"]["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {data['settings']['threads']} threads"
    return (
        f"{device}; {data['settings']['dtype']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, bitnet_triton {versions['bitnet_triton']}; "
        f"{data['date'][:10]}"
    )


def peaks_line(data: dict[str, Any]) -> str:
    """Return the measured limits in one line."""
    peaks = data["peaks"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks["flops_per_s"].items())
    loads = data["load_average"]
    return (
        f"measured in this run: reads {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"products {rates} Gop/s; load average {loads['before']} before, {loads['after']} after"
    )
