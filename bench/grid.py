"""The points of a run: those of a case or shapes from the command line, under several settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Case, Point, Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Step:
    """One point of the grid under one setting.

    Attributes:
        point: for ``Case.inputs``.
        settings: how it is measured.
        shown: the point, and each setting that the run has several of.
    """

    point: Point
    settings: Settings
    shown: Point


def parse_pairs(option: str, text: str) -> dict[str, str]:
    """Read "M=1,K=4096".

    Raises:
        ValueError: the text has another form, or names a key twice.
    """
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if not key or not value:
            raise ValueError(f"`{option}`: expected KEY=VALUE[,KEY=VALUE], got {text!r}")
        if key in pairs:
            raise ValueError(f"`{option}`: {key} stands twice in {text!r}")
        pairs[key] = value
    return pairs


def points_of_shapes(case: Case, shapes: Sequence[Mapping[str, str]]) -> list[Point]:
    """Return a point for each shape; a key that it leaves out is that of the first point.

    Raises:
        ValueError: a key is not one of the case, or its value cannot be.
    """
    first = case.grid[0]
    points = []
    for shape in shapes:
        for key in shape:
            _check_key(case, key)
        points.append({key: _value(case, key, shape.get(key, str(first[key]))) for key in first})
    return points


def _check_key(case: Case, key: str) -> None:
    known = case.grid[0]
    if key not in known:
        raise ValueError(f"`shape`: {case.name} has the keys {', '.join(known)}; got {key!r}")


def _value(case: Case, key: str, text: str) -> Any:
    if isinstance(case.grid[0][key], int):
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"`shape`: expected a positive number for {key}, got {text!r}")
        return int(text)
    known = list(dict.fromkeys(point[key] for point in case.grid))
    if text not in known:
        raise ValueError(f"`shape`: expected {key} to be {' or '.join(known)}, got {text!r}")
    return text


def steps(
    points: Sequence[Point], settings: Settings, dtypes: Sequence[str], threads: Sequence[int]
) -> list[Step]:
    """Return every point under every dtype and number of threads.

    Args:
        points: of the grid.
        settings: everything else.
        dtypes: of the inputs, by their short names.
        threads: of PyTorch.
    """
    return [
        Step(
            point,
            dataclasses.replace(settings, threads=count, dtype=DTYPES[dtype]),
            {
                **point,
                **({"dtype": dtype} if len(dtypes) > 1 else {}),
                **({"threads": count} if len(threads) > 1 else {}),
            },
        )
        for count in threads
        for dtype in dtypes
        for point in points
    ]
