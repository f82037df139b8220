"""Draw a result from its JSON alone: a panel for each point with a bar for each provider.

A case with a curve has lines instead: the time of a unit over one key of its points.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import axes_of, setup_line, speed, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = "#1b6ca8"
# Colours of the others, in the order of their first row
_OTHERS = ("#e08e45", "#b8b8b8", "#8c6bb1", "#5aae61", "#c0626f")
_DPI = 150
_QUANTILES = ("median", "p20", "p80")


def _panel_keys(rows: list[dict[str, Any]], keys: list[str]) -> list[tuple]:
    return list(dict.fromkeys(tuple(row["point"].get(key) for key in keys) for row in rows))


def _name(keys: list[str], values: tuple) -> str:
    pairs = dict(zip(keys, values))
    if set(pairs) == {"K", "N"}:
        return f"{pairs['K']} → {pairs['N']}"
    plain = [str(v) for k, v in pairs.items() if not isinstance(v, int)]
    return ", ".join([f"{k} = {v}" for k, v in pairs.items() if isinstance(v, int)] + plain)


def _colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    names = list(dict.fromkeys(row["provider"] for row in rows))
    palette = itertools.chain([_OURS], itertools.cycle(_OTHERS))
    return dict(zip(names, palette))


def _value(row: dict[str, Any], unit: str, key: str = "median") -> float:
    seconds = row["seconds"][key]
    return row["units"] / seconds if unit else seconds


def _draw_bars(
    axes: Axes, rows: list[dict[str, Any]], data: dict[str, Any], colours: dict[str, str]
) -> None:
    unit, baseline = data["unit"], data["baselines"][0]
    timed = [row for row in rows if row["status"] == "timed"]
    longest = max((_value(row, unit) for row in timed), default=1.0)
    for i, row in enumerate(rows):
        if row["status"] != "timed":
            axes.text(0, i, f" not timed: {row['status']}", va="center", size=8, color="#a33")
            continue
        value = _value(row, unit)
        ends = [_value(row, unit, key) for key in ("p20", "p80")]
        errors = [[max(0.0, value - min(ends))], [max(0.0, max(ends) - value)]]
        axes.barh(
            i, value, height=0.72, color=colours[row["provider"]],
            xerr=errors, error_kw={"ecolor": "#333", "elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
        ratio = row["ratios"].get(baseline)
        text = speed(row, unit)
        if ratio is not None and row["provider"] != baseline:
            text += f"   {times(ratio['median'])}x"
        elif row["provider"] == baseline:
            text += "   1x"
        weight = "bold" if row["provider"] == rows[0]["provider"] else "normal"
        axes.text(max(value, *ends) + 0.02 * longest, i, text, va="center", size=8, weight=weight)
    axes.set_xlim(0, 1.55 * longest)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], size=8)
    axes.set_xticks([])
    axes.tick_params(left=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_curves(
    axes: Axes, rows: list[dict[str, Any]], data: dict[str, Any], colours: dict[str, str]
) -> None:
    key = data["curve"]
    for name, colour in colours.items():
        points = sorted(
            (row["point"][key], *(1e6 * row["seconds"][q] / row["units"] for q in _QUANTILES))
            for row in rows
            if row["provider"] == name and row["status"] == "timed"
        )
        if not points:
            continue
        label = next(row["label"] for row in rows if row["provider"] == name)
        at, median, low, high = zip(*points)
        axes.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(at, median, color=colour, marker="o", markersize=3, label=label)
    marks = sorted({row["point"][key] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(marks, [str(mark) for mark in marks], size=7)
    axes.minorticks_off()
    axes.set_xlabel(key, size=8)
    axes.set_ylabel(f"us a {data['unit'][:-1] or 'call'}", size=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#ddd", linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)


def _caption(data: dict[str, Any]) -> str:
    return f"{_meaning(data)}\n{setup_line(data)}; measured reads {_bandwidths(data)} GB/s"


def _bandwidths(data: dict[str, Any]) -> str:
    return " and ".join(f"{peak['read_bytes_per_s'] / 1e9:.1f}" for peak in data["peaks"])


def _meaning(data: dict[str, Any]) -> str:
    if data["curve"]:
        return "lower is faster; shaded: 20th to 80th percentile of the rounds"
    meaning = "time of a call, shorter is faster"
    if data["unit"]:
        meaning = f"{data['unit']} per second, longer is faster"
    labels = {row["provider"]: row["label"] for row in data["rows"]}
    baseline = labels.get(data["baselines"][0], data["baselines"][0])
    spread = "whiskers: 20th to 80th percentile of the rounds"
    return f"{meaning}; {spread}; x: times as fast as {baseline}"


def _size(data: dict[str, Any], panels: tuple[int, int], bars: int) -> tuple[float, float]:
    rows, columns = panels
    if data["curve"]:
        return 3.6 * columns, 3.0 * rows + 1.0
    return 1.9 + 3.1 * columns, rows * (0.27 * bars + 0.45) + 1.35


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the plot of a result as an image.

    Args:
        data: what ``report.read_json`` returns.
        path: the image; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("plots need matplotlib; install bitnet-triton[bench]") from error
    row_keys, column_keys = data["panels"][0] + axes_of(data), data["panels"][1]
    rows = data["rows"]
    colours = _colours(rows)
    row_names, column_names = _panel_keys(rows, row_keys), _panel_keys(rows, column_keys)
    shape = (len(row_names), len(column_names))
    figure = Figure(figsize=_size(data, shape, len(colours)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharey="row")
    draw_panel = _draw_curves if data["curve"] else _draw_bars
    for i, row_values in enumerate(row_names):
        for j, column_values in enumerate(column_names):
            axes = grid[i][j]
            here = [
                row
                for row in rows
                if tuple(row["point"].get(k) for k in row_keys) == row_values
                and tuple(row["point"].get(k) for k in column_keys) == column_values
            ]
            if not here:
                axes.set_visible(False)
                continue
            draw_panel(axes, here, data, colours)
            names = [_name(row_keys, row_values), _name(column_keys, column_values)]
            axes.set_title(";  ".join(filter(None, names)), size=9, loc="left")
    figure.suptitle(data["title"], size=12, weight="bold", x=0.01, ha="left")
    figure.supxlabel(_caption(data), size=7.5, color="#555", x=0.01, ha="left", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
