"""Run a case from the command line: progress, table, files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.case import Case, Settings
from bench.machine import load_average
from bench.measure import Row, measure_point
from bench.peaks import measure_peaks
from bench.plot import draw
from bench.report import point_name, print_table, read_json, result, write_json

# Load average from which another program is likely to disturb the times
_BUSY = 0.5

console = Console()


def run_case(
    case: Case,
    settings: Settings,
    *,
    only: Mapping[str, Sequence[str]],
    names: Sequence[str],
    output: Path,
) -> None:
    """Measure a case, print the table, write JSON and plot.

    Args:
        case: the workload.
        settings: how to measure.
        only: allowed values for keys of the grid.
        names: providers; empty for the default ones.
        output: the JSON; the plot lies beside it.
    """
    points, providers = case.select_points(only), case.select_providers(names)
    before = load_average()
    if before is not None and before > _BUSY:
        console.print(f"[yellow]The machine is busy (load average {before}): expect noise.[/]")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bandwidth and matrix rates of the machine", total=len(points))
        peaks = measure_peaks(settings)
        for point in points:

            def advance(what: str, name: str = point_name(point)) -> None:
                progress.update(task, description=escape(f"{name}: {what}"))

            rows += measure_point(case, point, providers, settings, peaks, advance)
            progress.advance(task)
    data = result(case, rows, settings, peaks, (before, load_average()))
    print_table(data, console)
    write_json(data, output)
    console.print(f"wrote {escape(shown(output))}")
    plot_file(output, output.with_suffix(".png"))


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
