"""``python -m bench tune``: progress, table, and the file that later runs read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bench.machine import command_line, describe_machine, describe_software, load_average
from bench.options import SCRATCH, Budget, Device, Quick, Rounds, read_settings, read_threads
from bench.report import write_json
from bench.run import console, shown
from bench.tune import KERNELS, MODELS, Outcome, choices, jobs, to_dict, tune
from bitnet_triton.runtime.measured import cache_file, write_choices


def tune_command(
    kernel: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(KERNELS)}; repeat for more. Default: all."),
    ] = None,
    model: Annotated[str, typer.Option(help=f"Whose shapes: one of {', '.join(MODELS)}.")] = "2b4t",
    size: Annotated[
        list[int] | None,
        typer.Option(help="Only the shape class up to this size; repeat for more."),
    ] = None,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(help="PyTorch threads; 0 takes one for each CPU.")] = 0,
    rounds: Rounds = 9,
    budget: Budget = 0.5,
    quick: Quick = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure, and keep nothing for later runs.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="The JSON. Default: runs/bench/tune.json.")
    ] = None,
) -> None:
    """Measure tile sizes on this machine, and use those that beat the shipped ones from now on.

    Nothing is ever tuned unasked. What wins is kept for this device, this release of Triton and
    these sources, in the user's cache directory; deleting the file undoes it.

        python -m bench tune --kernel ternary_linear_fwd --size 1

        python -m bench tune --model llama3-8b --dry-run
    """
    settings = read_settings(device, rounds, budget, quick, pause=0.0)
    settings = replace(settings, threads=read_threads([threads])[0])
    todo = [
        (name, each, make)
        for name in kernel or KERNELS
        for each, make in jobs(name, model, settings)
        if not size or each in size
    ]
    if not todo:
        raise ValueError("`size`: no shape class of these kernels is called so on this device")
    outcomes = [_tune_one(name, each, make, settings) for name, each, make in todo]
    console.print(_table(outcomes))
    target = output or SCRATCH / "tune.json"
    data = {
        "command": command_line(),
        "machine": describe_machine(settings.device),
        "software": describe_software(settings.device),
        "threads": settings.threads,
        "load": load_average(),
        "model": model,
        "outcomes": [to_dict(outcome) for outcome in outcomes],
    }
    write_json(data, target)
    console.print(f"wrote {escape(shown(target))}")
    _keep(outcomes, settings, dry_run)


def _tune_one(name: str, size: int, make: Any, settings: Any) -> Outcome:
    title = f"{name} up to {_size(size)}"
    with console.status(escape(title)) as status:
        outcome = tune(make(), settings, lambda what: status.update(escape(f"{title}: {what}")))
    gain = f"{outcome.gain['median']:.2f}x" if outcome.best != outcome.shipped else "shipped stays"
    console.print(f"{escape(title)}: {outcome.tried} candidates, {gain}", highlight=False)
    return outcome


def _keep(outcomes: list[Outcome], settings: Any, dry_run: bool) -> None:
    new = choices(outcomes, settings.device)
    if dry_run or not new:
        console.print("nothing is kept" + (": --dry-run" if dry_run else ""))
        return
    write_choices(cache_file(), new)
    console.print(f"kept {len(new)} in {escape(shown(cache_file()))}; later runs use them")


def _size(size: int) -> str:
    return "any" if size >= 2**31 else str(size)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Tiles", title_justify="left")
    for column in ("kernel", "up to", "shipped", "best", "times as fast", "candidates", "refused"):
        table.add_column(column)
    for o in outcomes:
        kept = o.best != o.shipped
        gain = f"{o.gain['median']:.2f} ({o.gain['p20']:.2f}-{o.gain['p80']:.2f})" if kept else ""
        table.add_row(
            o.kernel, _size(o.size), _tiles(o.shipped), _tiles(o.best) if kept else "", gain,
            str(o.tried), str(len(o.refused)),
        )  # fmt: skip
    return table


def _tiles(tiles: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tiles.items())
