"""The command ``training_memory``: run, print a table, write the JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bench.machine import command_line, describe_machine, describe_software
from bench.models import SHAPES
from bench.options import Device, Names, Output, read_settings, target
from bench.report import size, write_json
from bench.run import console, shown
from bench.training_memory import LABELS, PARTS, measure


def training_memory_command(
    layers: Annotated[int, typer.Option(help="How many; 0 takes all.")] = 0,
    tokens: Annotated[int, typer.Option(help="Of the one text of a step.")] = 512,
    shape: Annotated[str, typer.Option(help="2b4t, or tiny to see that it runs.")] = "2b4t",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing.")
    ] = False,
    provider: Names = None,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Compare the memory of a training step: LoRA beside packed weights, and what else there is.

    bfloat16 autocast, AdamW, adapters of rank 16 beside every linear. Models of one and of two
    layers are measured; with the same share for every further layer, that is a model of all.
    """
    for name in provider or ():
        if name not in LABELS:
            raise ValueError(f"`provider`: expected {', '.join(LABELS)}; got {name!r}")
    if shape not in SHAPES:
        raise ValueError(f"`shape`: expected one of {', '.join(SHAPES)}, got {shape!r}")
    widths = replace(SHAPES[shape], layers=layers or SHAPES[shape].layers)
    where = read_settings(device, 1, 1.0, quick=True).device
    rows = measure(widths, provider or list(LABELS), tokens, where, checkpointing)
    is_partial = bool(layers or provider or shape != "2b4t")
    path = target("training_memory", output, is_partial)
    write_json(
        {
            "case": "training_memory",
            "command": command_line(),
            "layers": widths.layers,
            "tokens": tokens,
            "checkpointing": checkpointing,
            "machine": describe_machine(where),
            "software": describe_software(where),
            "rows": rows,
        },
        path,
    )
    console.print(_table(rows))
    console.print(f"wrote {escape(shown(path))}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", *PARTS, "total", "of the\nlargest")
    most = max((row.get("total_bytes", 0) for row in rows), default=0)
    for row in rows:
        if row["status"] != "measured":
            table.add_row(escape(row["label"]), row["status"], escape(row["reason"]))
            continue
        cells = [size(row["bytes"][part]) for part in PARTS]
        total = row["total_bytes"]
        table.add_row(escape(row["label"]), *cells, size(total), f"{total / most:.2f}")
    return table
