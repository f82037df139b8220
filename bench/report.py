"""Results: a table for the terminal, and the JSON that every plot and figure comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.case import Case, Settings
from bench.machine import command_line, describe_machine, describe_software
from bench.measure import Row
from bench.peaks import Peaks

FORMAT = 1
RESULTS = Path(__file__).parent / "results"


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
        return f"{row['units'] / high:.3g} .. {row['units'] / low:.3g}"
    return f"{duration(low)} .. {duration(high)}"


def _ratio(row: dict[str, Any], baseline: str) -> str:
    found = row["ratios"].get(baseline)
    if found is None:
        return ""
    if row["provider"] == baseline:
        return "1"
    return f"[bold]{found['median']:.2f}x[/] ({found['p20']:.2f} .. {found['p80']:.2f})"


def _cells(row: dict[str, Any], data: dict[str, Any]) -> list[str]:
    label = escape(row["label"]) + (f"\n[dim]{escape(row['note'])}[/]" if row["note"] else "")
    if row["status"] != "timed":
        colour = "red" if row["status"] == "failed" else "yellow"
        return [label, f"[{colour}]{row['status']}[/]: {escape(row['reason'])}"]
    share = row["share_of_peak"]
    return [
        label,
        speed(row, data["unit"]),
        _spread(row, data["unit"]),
        *(_ratio(row, baseline) for baseline in data["baselines"]),
        f"{share:.0%} {row['bound']}" if share is not None else "",
        duration(row["first_call_s"]),
        size(row["peak_extra_bytes"]),
        f"{row['error']:.1e}",
    ]


def print_table(data: dict[str, Any], console: Console) -> None:
    """Print a result; the same from a fresh run and from a file."""
    labels = {row["provider"]: row["label"] for row in data["rows"]}
    table = Table(title=escape(data["title"]), title_justify="left")
    for column in ("provider", "median", "p20 .. p80"):
        table.add_column(column)
    for baseline in data["baselines"]:
        table.add_column(f"times as fast as\n{labels.get(baseline, baseline)}")
    for column in ("share of\nmeasured peak", "first call", "memory\nof a call", "error"):
        table.add_column(column, justify="right")
    last = None
    for row in data["rows"]:
        if row["point"] != last:
            table.add_section()
            table.add_row(f"[bold cyan]{escape(point_name(row['point']))}[/]")
            last = row["point"]
        table.add_row(*_cells(row, data))
    console.print(table)
    console.print(escape(setup_line(data)), style="dim")
    console.print(escape(peaks_line(data)), style="dim")


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
