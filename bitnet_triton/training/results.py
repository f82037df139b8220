"""What was measured, a line a batch, so that a killed run goes on; and the sums of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEPTH_BINS = 5


class Store:
    """Lines of JSON, in a file or in memory only.

    Args:
        folder: where ``run.json`` and ``lines.jsonl`` stand; None: nowhere.
        run: what is measured; a folder that holds something else is refused.

    Raises:
        ValueError: the folder belongs to another run.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        self.run, self.lines = run, []  # type: tuple[dict[str, Any], list[dict[str, Any]]]
        self._path = None if folder is None else folder / "lines.jsonl"
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        head = folder / "run.json"
        if head.exists():
            known = json.loads(head.read_text(encoding="utf-8"))
            other = [key for key in run if known.get(key) != json.loads(json.dumps(run[key]))]
            if other:
                raise ValueError(
                    f"`output`: {folder} holds a run with other {', '.join(other)}; choose a new "
                    "folder, or repeat that run to go on with it"
                )
        else:
            head.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        assert self._path is not None
        if self._path.exists():
            self.lines = list(_whole_lines(self._path))

    def has(self, **key: Any) -> bool:
        """Tell whether a line with these fields is there."""
        return any(all(line.get(k) == v for k, v in key.items()) for line in self.lines)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line; it is on disk when this returns."""
        self.lines.append(line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the lines of a file; cuts off one that a killed run has begun."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


@dataclass
class Score:
    """Mean of a task's scores.

    Attributes:
        mean: 0 to 1.
        low: lower end of the 95 % interval.
        high: its upper end.
        answers: how many there were.
        by_depth: mean for each fifth of the context that holds what is asked for; None: no answer.
    """

    mean: float
    low: float
    high: float
    answers: int
    by_depth: list[float | None]


@dataclass
class Report:
    """All that was measured.

    Attributes:
        run: model, tasks, lengths, settings, seed and the rest of what was asked for.
        scores: setting -> task -> length -> score.
        text: setting -> length -> bits per byte, and bits per token by position.
        footprints: setting -> length -> what is read and held.
        seconds: setting -> seconds that its answers took.
    """

    run: dict[str, Any]
    scores: dict[str, dict[str, dict[int, Score]]] = field(default_factory=dict)
    text: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    footprints: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def wilson(mean: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's formula; sound at 0 and 1 too."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(store: Store) -> Report:
    """Add up the lines of a run."""
    report = Report(store.run)
    answers: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    pieces: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for line in store.lines:
        setting, length = line["setting"], line["length"]
        if line["kind"] == "answers":
            answers[setting, line["task"], length] += line["answers"]
            seconds = report.seconds.get(setting, 0.0) + line["seconds"]
            report.seconds[setting] = seconds
        elif line["kind"] == "text":
            pieces[setting, length] += line["pieces"]
        else:
            report.footprints.setdefault(setting, {})[length] = line["footprint"]
    for (setting, task, length), found in answers.items():
        by_task = report.scores.setdefault(setting, {}).setdefault(task, {})
        by_task[length] = _score(found)
    for (setting, length), costs in pieces.items():
        report.text.setdefault(setting, {})[length] = _text(costs)
    return report


def _score(answers: list[dict[str, Any]]) -> Score:
    scores = [answer["score"] for answer in answers]
    bins: list[list[float]] = [[] for _ in range(DEPTH_BINS)]
    for answer in answers:
        bins[min(int(answer["depth"] * DEPTH_BINS), DEPTH_BINS - 1)].append(answer["score"])
    mean = sum(scores) / len(scores)
    # answers about one text are no independent ones: the interval counts texts
    low, high = wilson(mean, len({answer["prompt"] for answer in answers}))
    by_depth = [sum(found) / len(found) if found else None for found in bins]
    return Score(mean, low, high, len(scores), by_depth)


def _text(costs: list[dict[str, float]]) -> dict[str, Any]:
    def total(name: str, piece: int | None = None) -> float:
        return sum(cost[name] for cost in costs if piece in (None, cost["piece"]))

    pieces = sorted({int(cost["piece"]) for cost in costs})
    return {
        "bits_per_byte": total("bits") / total("bytes"),
        "perplexity": 2 ** (total("bits") / total("tokens")),
        "bits_per_byte_by_position": [total("bits", p) / total("bytes", p) for p in pieces],
    }
