"""Pictures of a report: accuracy by length and depth, and what it costs in rows and memory."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bitnet_triton.training.results import DEPTH_BINS, Report
from bitnet_triton.training.tasks import TASKS


def plot(report: Report, folder: Path) -> list[Path]:
    """Draw ``depth.png`` and ``cost.png`` from a report.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing: install bitnet-triton[bench]") from error

    if not report.scores:
        return []
    pictures = {"depth.png": _depths(Figure, report), "cost.png": _costs(Figure, report)}
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
    return [folder / name for name in pictures]


def _depths(make: Any, report: Report) -> Any:
    """Draw a heat map for each setting and task: depth from top to bottom, length to the right."""
    settings, lengths = list(report.scores), sorted(report.run["lengths"])
    # where all facts are needed, there is no depth to tell apart
    tasks = [name for name in report.run["tasks"] if not name.endswith("_words")]
    tasks = tasks or list(report.run["tasks"])
    figure = make(figsize=(1 + 1.5 * len(tasks), 0.8 + 1.3 * len(settings)))
    axes = figure.subplots(len(settings), len(tasks), squeeze=False)
    for row, setting in enumerate(settings):
        for column, task in enumerate(tasks):
            axis, scores = axes[row][column], report.scores[setting].get(task, {})
            cells = [
                [_cell(scores.get(length), depth) for length in lengths]
                for depth in range(DEPTH_BINS)
            ]
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6, rotation=60)
            axis.set_yticks([])
            if row == 0:
                axis.set_title(task, fontsize=8)
            if column == 0:
                axis.set_ylabel(setting, fontsize=6, rotation=0, ha="right", va="center")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.6)
    figure.supxlabel(
        "tokens; from top to bottom: depth of the fact, 0 to 1",
        fontsize=8,
        y=-0.3 / figure.get_figheight(),
    )
    return figure


def _cell(score: Any, depth: int) -> float:
    value = None if score is None else score.by_depth[depth]
    return float("nan") if value is None else value


def _costs(make: Any, report: Report) -> Any:
    """Draw mean accuracy against keys read and against memory held.

    The keys are those of the token that the first word of an answer comes from: the last one of the
    prompt, or a generated one where questions are. Points are numbered, because many lie upon each
    other; a list on the right says which is which.
    """
    length = max(report.run["lengths"])
    of_prompt = report.run["question"] == "prompt"
    figure = make(figsize=(12, max(5.0, 1 + 0.13 * len(report.scores))))
    left, right = figure.subplots(1, 2, sharey=True)
    places: list[list[tuple[float, float, str]]] = [[], []]
    names = []
    for number, setting in enumerate(report.scores, 1):
        plain = mean_score(report, setting, length, hard=False)
        cost = report.footprints.get(setting, {}).get(length)
        if plain is None or cost is None:
            continue
        names.append(f"{number}  {setting}")
        rows = cost["rows_prompt" if of_prompt else "rows_decode"]
        for at, value in zip(places, (rows, cost["cache_bytes"] / 1e6)):
            at.append((value, plain, str(number)))
    for axis, points, scale in zip((left, right), places, (math.log2, float)):
        for x, y, _ in points:
            axis.plot([x], [y], "o", color="tab:blue", alpha=0.7)
        # the highest of points first: a label stands above all that it joins
        found = labels(sorted(points, key=lambda p: -p[1]), scale)
        wide = max((x for x, _ in found), default=0) - min((x for x, _ in found), default=0)
        for (x, y), numbers in found.items():
            style: dict[str, Any] = {"rotation": 90, "xytext": (0, 5), "ha": "center"}
            if axis is right:  # points stand above each other: beside them, where there is room
                room = all(not 0 < a - x < 0.06 * wide or abs(b - y) > 0.06 for a, b in found)
                style = {"xytext": (6 if room else -6, 0), "ha": "left" if room else "right"}
            axis.annotate(
                textwrap.fill(ranges(sorted(map(int, numbers))), 8 if axis is right else 22),
                (x, y), fontsize=7, textcoords="offset points",
                va="center" if axis is right else "bottom", **style,
            )  # fmt: skip
        axis.margins(x=0.18)  # room for labels of several lines at the edges
    left.set_xscale("log", base=2)
    who = "the last token of a prompt" if of_prompt else "a generated token"
    left.set_xlabel(f"keys that {who} reads (mean over layers and heads)")
    right.set_xlabel("cache of one sequence, MB")
    left.set_ylabel("mean accuracy, tasks that are not hard")
    left.set_ylim(-0.03, 1.3)
    left.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    figure.text(0.92, 0.9, "\n".join(names), fontsize=7, va="top")
    figure.suptitle(f"{length} tokens", fontsize=10)
    return figure


def labels(
    points: Sequence[tuple[float, float, str]], scale: Callable[[float], float] = float
) -> dict[tuple[float, float], list[str]]:
    """Join the labels of points that lie so near each other that they could not be read.

    Args:
        points: x, y and label.
        scale: of the x axis.

    Returns:
        where each joined label stands, at the first of its points, and what it says.
    """
    xs = [scale(x) for x, _, _ in points]
    wide = max(xs, default=0.0) - min(xs, default=0.0)
    found: dict[tuple[float, float], list[str]] = {}
    for x, y, label in points:
        for (at_x, at_y), names in found.items():
            if abs(scale(x) - scale(at_x)) <= 0.03 * wide and abs(y - at_y) <= 0.06:
                names.append(label)
                break
        else:
            found[x, y] = [label]
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers, three or more that follow one another as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def mean_score(report: Report, setting: str, length: int, *, hard: bool) -> float | None:
    """Return the mean over the tasks that are hard, or over those that are not."""
    scores = [
        by_length[length].mean
        for task, by_length in report.scores.get(setting, {}).items()
        if TASKS[task].hard == hard and length in by_length
    ]
    return sum(scores) / len(scores) if scores else None
