"""What the command line offers, and how it is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.case import Case, Settings
from bench.grid import DTYPES, parse_pairs, points_of_shapes
from bench.report import RESULTS

# Where runs go that are not meant to be published
SCRATCH = Path("runs") / "bench"
_GRID, _HOW, _RESULT = "What", "How", "Result"

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="KEY=VALUE,...",
        help="A point of your own in place of the grid, as M=1,K=4096,N=14336; repeat for more. "
        "What it leaves out is as in the grid's first point. See --list.",
        rich_help_panel=_GRID,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,...",
        help="Part of the grid: the points whose KEY has one of the values, as M=1,2; repeat for "
        "more keys.",
        rich_help_panel=_GRID,
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        help="Run this provider, or peer; repeat for more. Without it: the default ones. "
        "See --list.",
        rich_help_panel=_GRID,
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        help="Of the inputs: bf16, fp16 or fp32; repeat to have several in one table.",
        rich_help_panel=_GRID,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, or auto for a GPU where there is one.", rich_help_panel=_HOW),
]
Threads = Annotated[
    list[int] | None,
    typer.Option(
        help="PyTorch threads; repeat to have several in one table; 0 takes one for each CPU, "
        "which is the default.",
        rich_help_panel=_HOW,
    ),
]
Rounds = Annotated[
    int, typer.Option(help="Turns of each provider at each point.", rich_help_panel=_HOW)
]
Budget = Annotated[
    float,
    typer.Option(help="Seconds of timing for one point, roughly.", rich_help_panel=_HOW),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Few short rounds: to see that it runs.", rich_help_panel=_HOW),
]
Seed = Annotated[int, typer.Option(help="Of all random inputs.", rich_help_panel=_HOW)]
Output = Annotated[
    Path | None,
    typer.Option(
        help="The JSON; a PNG of the same name lies beside it. Default: runs/bench/CASE.json, and "
        "bench/results/CASE.json for a full run.",
        rich_help_panel=_RESULT,
    ),
]


def read_settings(
    device: str, rounds: int, budget: float, quick: bool, seed: int = 0, pause: float = 0.01
) -> Settings:
    """Return how to measure, whatever the dtype and the threads."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected cpu, cuda or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device: PyTorch sees no GPU here")
    return Settings(
        device=torch.device(device),
        rounds=3 if quick else rounds,
        block_s=0.02 if quick else 0.1,
        budget_s=1.0 if quick else budget,
        pause_s=0.0 if quick else pause,
        seed=seed,
    )


def read_threads(threads: Sequence[int] | None) -> list[int]:
    """Return numbers of threads, each once; one for each CPU where there are none."""
    for count in threads or ():
        if count < 0:
            raise typer.BadParameter(f"--threads: expected 0 or more, got {count}")
    return list(dict.fromkeys(count or os.cpu_count() or 1 for count in threads or [0]))


def read_dtypes(names: Sequence[str] | None) -> list[str]:
    """Return dtypes by their short names, each once."""
    for name in names or ():
        if name not in DTYPES:
            raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return list(dict.fromkeys(names or ["bf16"]))


def read_only(only: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the values that each key may have."""
    parsed = {}
    for part in only or []:
        key, separator, values = part.partition("=")
        if not separator or not values:
            raise typer.BadParameter(f"--only: expected KEY=VALUE[,VALUE], got {part!r}")
        parsed[key] = values.split(",")
    return parsed


def with_shapes(case: Case, shapes: Sequence[str] | None) -> Case:
    """Return the case with the points that ``--shape`` gives, if it gives any."""
    if not shapes:
        return case
    return case.with_grid(points_of_shapes(case, [parse_pairs("shape", text) for text in shapes]))


def target(name: str, output: Path | None, partial: bool) -> Path:
    """Return where the JSON goes; what is no full run is not for publication."""
    if output is not None:
        return output
    return (SCRATCH if partial else RESULTS) / f"{name}.json"
