"""Pictures of a report: accuracy by length and depth, and what it costs in rows and memory."""

from __future__ import annotations

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
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6)
            axis.set_yticks([])
            if row == 0:
                axis.set_title(task, fontsize=8)
            if column == 0:
                axis.set_ylabel(setting, fontsize=6, rotation=0, ha="right", va="center")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.6)
    figure.supxlabel("tokens; from top to bottom: depth of the fact, 0 to 1", fontsize=8)
    return figure


def _cell(score: Any, depth: int) -> float:
    value = None if score is None else score.by_depth[depth]
    return float("nan") if value is None else value


def _costs(make: Any, report: Report) -> Any:
    """Draw mean accuracy against keys read by a generated token, and against memory held."""
    length = max(report.run["lengths"])
    figure = make(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    for setting in report.scores:
        plain = mean_score(report, setting, length, hard=False)
        cost = report.footprints.get(setting, {}).get(length)
        if plain is None or cost is None:
            continue
        for axis, value in ((left, cost["rows_decode"]), (right, cost["cache_bytes"] / 1e6)):
            axis.plot([value], [plain], "o")
            axis.annotate(
                setting, (value, plain), fontsize=6, rotation=20, xytext=(3, 3),
                textcoords="offset points",
            )  # fmt: skip
    left.set_xscale("log")
    left.set_xlabel("keys that a generated token reads (mean over layers and heads)")
    right.set_xlabel("cache of one sequence, MB")
    left.set_ylabel("mean accuracy, tasks that are not hard")
    left.set_ylim(-0.03, 1.12)
    figure.suptitle(f"{length} tokens", fontsize=10)
    return figure


def mean_score(report: Report, setting: str, length: int, *, hard: bool) -> float | None:
    """Return the mean over the tasks that are hard, or over those that are not."""
    scores = [
        by_length[length].mean
        for task, by_length in report.scores.get(setting, {}).items()
        if TASKS[task].hard == hard and length in by_length
    ]
    return sum(scores) / len(scores) if scores else None
