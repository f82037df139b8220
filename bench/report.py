"""Results: the JSON that every table, plot and figure comes from, and how numbers are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.case import Case, Settings
from bench.machine import command_line, describe_machine, describe_software
from bench.measure import Row
from bench.peaks import Peaks
from bench.peers import PEERS

FORMAT = 2
RESULTS = Path(__file__).parent / "results"


def result(
    case: Case,
    rows: Sequence[Row],
    settings: Sequence[Settings],
    peaks: Mapping[int, Peaks],
    loads: tuple[float | None, float | None],
) -> dict[str, Any]:
    """Return everything about a run as plain data.

    Args:
        case: what was measured.
        rows: of all points.
        settings: of every step; they differ in dtype and threads alone.
        peaks: measured in the same run, by the number of threads.
        loads: the machine's load before and after.
    """
    first = settings[0]
    dtypes = [str(each.dtype).removeprefix("torch.") for each in settings]
    return {
        "format": FORMAT,
        "case": case.name,
        "title": case.title,
        "unit": case.unit,
        "baselines": list(case.baselines),
        "panels": [list(keys) for keys in case.panels],
        "curve": case.curve,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "settings": {
            "dtypes": list(dict.fromkeys(dtypes)),
            "threads": list(dict.fromkeys(each.threads for each in settings)),
            "rounds": first.rounds,
            "block_s": first.block_s,
            "budget_s": first.budget_s,
            "pause_s": first.pause_s,
            "seed": first.seed,
        },
        "machine": describe_machine(first.device),
        "load_average": {"before": loads[0], "after": loads[1]},
        "software": describe_software(first.device),
        "peers": {peer.name: peer.state() for peer in PEERS},
        "peaks": [{"threads": threads, **peak.to_dict()} for threads, peak in peaks.items()],
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


def count(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def speed(row: dict[str, Any], unit: str) -> str:
    """Return the median of a row: a rate where the case counts units, else a time."""
    median = row["seconds"]["median"]
    return f"{count(row['units'] / median)} {unit}/s" if unit else duration(median)


def times(ratio: float) -> str:
    """Return a ratio with as many digits as mean something."""
    if ratio >= 100:
        return f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def axes_of(data: dict[str, Any]) -> list[str]:
    """Return the settings that a run has several of; its points name them."""
    settings = data["settings"]
    several = {"dtype": settings["dtypes"], "threads": settings["threads"]}
    return [name for name, values in several.items() if len(values) > 1]


def instructions_line(data: dict[str, Any]) -> str:
    """Return the instruction sets of the CPU that make a difference."""
    machine = data["machine"]
    return (
        f"{machine['architecture']} with {' '.join(machine['flags']) or 'no vectors that matter'}"
    )


def setup_line(data: dict[str, Any]) -> str:
    """Return machine and versions in one line."""
    machine, versions = data["machine"], data["software"]["versions"]
    threads = " and ".join(str(number) for number in data["settings"]["threads"])
    device = machine.get("gpu") or f"{machine['cpu']}, {threads} threads"
    return (
        f"{device}; {', '.join(data['settings']['dtypes'])}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, bitnet_triton {versions['bitnet_triton']}; "
        f"{data['date'][:10]}"
    )
