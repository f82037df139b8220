"""Run a case from the command line: progress, table, files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.case import Case, Settings
from bench.grid import Step
from bench.machine import load_average
from bench.measure import Row, measure_point
from bench.peaks import Peaks, Reads, measure_limits
from bench.plot import draw
from bench.report import point_name, read_json, result, write_json
from bench.table import print_table
from bench.turns import Advance

# Load average from which another program is likely to disturb the times
_BUSY = 0.5

console = Console()


def run_case(case: Case, steps: Sequence[Step], names: Sequence[str], output: Path) -> None:
    """Measure a case, print the table, write JSON and plot.

    Args:
        case: the workload.
        steps: its points, and how each is measured.
        names: providers; empty for the default ones.
        output: the JSON; the plot lies beside it.

    Raises:
        ValueError: a name is unknown.
    """
    providers = case.select_providers(names)
    before = load_average()
    if before is not None and before > _BUSY:
        console.print(f"[yellow]The machine is busy (load average {before}): expect noise.[/]")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    limits: dict[int, tuple[Peaks, Reads]] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(steps))
        for step in steps:

            def advance(what: str, name: str = point_name(step.shown)) -> None:
                progress.update(task, description=escape(f"{name}: {what}"))

            peaks, reads = _limits(limits, step.settings, advance)
            measured = measure_point(
                case, step.point, providers, step.settings, peaks, advance, reads
            )
            for row in measured:
                row.point = dict(step.shown)
            rows += measured
            progress.advance(task)
    peaks = {threads: peaks for threads, (peaks, _) in limits.items()}
    settings = [step.settings for step in steps]
    data = result(case, rows, settings, peaks, (before, load_average()))
    print_table(data, console)
    write_json(data, output)
    console.print(f"wrote {escape(shown(output))}")
    plot_file(output, output.with_suffix(".png"))


def _limits(
    known: dict[int, tuple[Peaks, Reads]], settings: Settings, advance: Advance
) -> tuple[Peaks, Reads]:
    """Measure the machine once for each number of threads."""
    if settings.threads not in known:
        advance("bandwidth and matrix rates of the machine")
        known[settings.threads] = measure_limits(settings)
    return known[settings.threads]


def shown(path: Path) -> str:
    """Return a path as it is told, relative to where we are."""
    return os.path.relpath(path)


def plot_file(source: Path, image: Path) -> None:
    """Draw a JSON, or say what is missing to do so."""
    try:
        draw(read_json(source), image)
    except ModuleNotFoundError as missing:
        console.print(f"[yellow]no plot: {escape(str(missing))}[/]")
    else:
        console.print(f"wrote {escape(shown(image))}")
