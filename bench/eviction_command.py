"""The command ``eviction``: measure prompt by prompt, print a table, write the JSON and a plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from bench.case import PeerMissingError
from bench.eviction import (
    BUDGETS,
    PAIRS,
    QUESTIONS,
    TASK_NAMES,
    TWICE,
    Kvpress,
    Ours,
    OursTwice,
    cells,
    check_equal,
    compare,
    label,
)
from bench.machine import command_line, describe_machine, describe_software
from bench.options import Output, Seed, Threads, read_threads, target
from bench.peers import KVPRESS
from bench.report import write_json
from bench.run import console, shown
from bitnet_triton.assets import embedded

_NAMES = (*TASK_NAMES, "text")
_SIDES = ("bitnet_triton", "twice", "kvpress")


def eviction_command(
    parts: Annotated[Path, typer.Option(help="Folder of what was measured, a line a prompt.")],
    model: Annotated[str, typer.Option(help="A folder, or the name of an embedded model.")] = (
        "recall"
    ),
    length: Annotated[int, typer.Option(help="Tokens of a prompt with questions.")] = 4096,
    samples: Annotated[int, typer.Option(help="Prompts of each task, and stretches of text.")] = 20,
    task: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(_NAMES)}; repeat for more.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="unseen, seen, or both by repeating it.")
    ] = None,
    side: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(_SIDES)}; repeat for more.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Compare what memories keep that drop tokens with kvpress's presses.

    Same weights, prompts and numbers of rows; answers, or bits per byte of text, prompt by prompt.
    A run that was killed goes on where it was, and its parts may be run one by one, into one
    folder: the table has all that is there.

        python -m bench eviction --parts runs/eviction --task recall --question unseen --samples 2
    """
    options = (("task", _NAMES, task), ("question", QUESTIONS, question), ("side", _SIDES, side))
    for name, known, given in options:
        for value in given or ():
            if value not in known:
                raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")
    if samples < 1:
        raise ValueError(f"`samples`: expected at least 1, got {samples}")
    torch.set_num_threads(read_threads(threads)[0])
    logging.getLogger("kvpress").setLevel(
        logging.ERROR
    )  # it warns of models that it was not run on
    folder = embedded(model)
    sides, reason = _sides(folder, side or _SIDES, seed)
    parts.mkdir(parents=True, exist_ok=True)
    for which in question or QUESTIONS:
        for name in task or _NAMES:
            if name != "text" or which == "unseen":  # a text asks nothing
                _measure(sides, (name, which), length, samples, seed, folder, parts)
    data = {
        "case": "eviction", "command": command_line(), "length": length, "seed": seed,
        "machine": describe_machine(torch.device("cpu")),
        "software": {**describe_software(torch.device("cpu")), "kvpress": KVPRESS.state()},
        "missing": reason, **summarise(parts, length, seed),
    }  # fmt: skip
    path = target("eviction", output, partial=True)
    write_json(data, path)
    for which in QUESTIONS:
        console.print(_table(data, which))
    draw(data, path.with_suffix(".png"))
    console.print(f"wrote {escape(shown(path))} and its plot")


def _sides(folder: str, wanted: Sequence[str], seed: int) -> tuple[dict[str, Any], str]:
    """Return who reads prompts, and why kvpress is not among them."""
    sides: dict[str, Any] = {
        "bitnet_triton": Ours(folder, torch.float32),
        "twice": OursTwice(folder, torch.float32),
    }
    reason = ""
    if "kvpress" in wanted:
        try:
            sides["kvpress"] = Kvpress(folder, torch.float32)
        except PeerMissingError as error:
            reason = str(error)
            console.print(f"kvpress: {escape(reason)}", highlight=False)
        else:
            random = torch.Generator().manual_seed(seed)
            ids = torch.randint(10, 1000, (1, 256), generator=random)
            check_equal(sides["bitnet_triton"], sides["kvpress"], ids)
    return {name: one for name, one in sides.items() if name in wanted}, reason


def _file(parts: Path, length: int, seed: int, question: str, task: str) -> Path:
    return parts / f"{length}-{seed}-{question}-{task}.jsonl"


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _measure(
    sides: dict[str, Any], cell: tuple[str, str], length: int, samples: int, seed: int,
    folder: str, parts: Path,
) -> None:  # fmt: skip
    task, question = cell
    file = _file(parts, length, seed, question, task)
    done = {(line["prompt"], line["side"]) for line in _lines(file)}
    for index, run in cells(task, question, length, samples, seed, folder):
        for side, reader in sides.items():
            if (index, side) in done:
                continue
            line = {"prompt": index, "side": side, "found": run(reader)}
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        console.print(f"{task} {question}: {index + 1} of {samples}")


def summarise(parts: Path, length: int, seed: int) -> dict[str, Any]:
    """Return means, bytes and paired differences of all that was measured by both sides."""
    table: dict[str, Any] = {}
    for question in QUESTIONS:
        for task in _NAMES:
            found: dict[str, dict[int, dict[str, Any]]] = {}
            for line in _lines(_file(parts, length, seed, question, task)):
                for name, one in line["found"].items():
                    found.setdefault(name, {})[line["prompt"]] = one
            prompts = sorted(set.intersection(*map(set, found.values()))) if found else []
            if prompts:
                table.setdefault(question, {})[task] = _cell(found, prompts)
    return {"table": table}


def _cell(found: dict[str, dict[int, dict[str, Any]]], prompts: Sequence[int]) -> dict[str, Any]:
    scores = {name: [one[i]["score"] for i in prompts] for name, one in found.items()}
    rows = {
        name: {
            "score": sum(values) / len(values), "n": len(values),
            "bytes": sum(found[name][i]["bytes"] for i in prompts) / len(prompts),
        }
        for name, values in scores.items()
    }  # fmt: skip
    pairs = {}
    for share in BUDGETS:
        for ours, theirs in (*PAIRS.items(), TWICE):
            one, other = label((ours, share)), label((theirs, share))
            if one in scores and other in scores:
                pairs[f"{one} - {other}"] = compare(scores[one], scores[other])
    return {"rows": rows, "pairs": pairs}


def _choices() -> list[tuple[str, float]]:
    """Return all rows of the table, ours beside theirs."""
    names: list[str] = []
    for ours, theirs in (*PAIRS.items(), TWICE):
        names += [ours] if theirs in names else [ours, theirs]
    return [("plain", 1.0), *((n, share) for n in names for share in BUDGETS)]


def _table(data: dict[str, Any], question: str) -> Table:
    tasks = data["table"].get(question, {})
    table = Table("", "MB", *tasks, title=f"questions {question}, {data['length']} tokens")
    for choice in _choices():
        rows = {task: cell["rows"].get(label(choice)) for task, cell in tasks.items()}
        held = [row["bytes"] for task, row in rows.items() if row and task != "text"]
        if not any(rows.values()):
            continue
        cells = [_score(task, row) for task, row in rows.items()]
        table.add_row(label(choice), f"{sum(held) / len(held) / 1e6:.2f}" if held else "", *cells)
    return table


def _score(task: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['score']:.3f}" if task == "text" else f"{row['score']:.1f}"


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw quality over bytes: the mean of all tasks, and bits per byte of text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing: install bitnet-triton[bench]") from error
    unseen, seen = (data["table"].get(question, {}) for question in QUESTIONS)
    recall = {task: cell for task, cell in unseen.items() if task != "text"}
    panels: tuple[tuple[str, dict[str, Any]], ...] = (
        ("questions unseen, mean of tasks in %", recall),
        ("first question seen, mean of tasks in %", seen),
        ("text, bits per byte", {task: cell for task, cell in unseen.items() if task == "text"}),
    )
    panels = tuple(panel for panel in panels if panel[1])
    figure = Figure(figsize=(2 + 4.2 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, cells_) in zip(axes, panels):
        _draw_panel(axis, cells_)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("MB of keys and values", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_panel(axis: Any, tasks: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for name, _ in _choices()))
    beside = dict([*PAIRS.items(), TWICE])
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(beside.values()))}
    for name in names:
        points = []
        for choice in _choices():
            rows = [cell["rows"][label(choice)] for cell in tasks.values()
                    if choice[0] == name and label(choice) in cell["rows"]]  # fmt: skip
            if rows:
                means = [sum(row[key] for row in rows) / len(rows) for key in ("bytes", "score")]
                points.append((means[0] / 1e6, means[1]))
        is_ours = name in beside
        colour = colours.get(beside.get(name, name), "black")
        marker = "x" if not is_ours else "s" if ":" in name else "o"  # two of ours beside one press
        axis.plot(
            *zip(*sorted(points)) if points else ((), ()),
            marker=marker, linestyle="-" if is_ours else "--", color=colour, label=name, alpha=0.8,
        )  # fmt: skip
    axis.grid(alpha=0.3)
