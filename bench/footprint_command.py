"""The command ``footprint``: run, print a table, write the JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from bench.footprint import LABELS, measure
from bench.machine import command_line, describe_machine, describe_software
from bench.models import SHAPES
from bench.options import Names, Output, Threads, read_threads, target
from bench.report import size, write_json
from bench.run import console, shown


def footprint_command(
    layers: Annotated[int, typer.Option(help="How many; 0 takes all.")] = 0,
    shape: Annotated[str, typer.Option(help="2b4t, or tiny to see that it runs.")] = "2b4t",
    provider: Names = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Compare the memory that loading a whole model and decoding take with the size of its file.

    Each provider loads a packed checkpoint (llama.cpp: a GGUF), in a process of its own, reads 32
    tokens and decodes two. It needs 3.3 GB of the temporary folder.
    """
    for name in provider or ():
        if name not in LABELS:
            raise ValueError(f"`provider`: expected {', '.join(LABELS)}; got {name!r}")
    if shape not in SHAPES:
        raise ValueError(f"`shape`: expected one of {', '.join(SHAPES)}, got {shape!r}")
    widths = replace(SHAPES[shape], layers=layers or SHAPES[shape].layers)
    count = read_threads(threads)[0]
    rows = measure(widths, provider or list(LABELS), count)
    path = target("footprint", output, bool(layers or provider or shape != "2b4t"))
    cpu = torch.device("cpu")
    write_json(
        {
            "case": "footprint",
            "command": command_line(),
            "layers": widths.layers,
            "threads": count,
            "machine": describe_machine(cpu),
            "software": describe_software(cpu),
            "rows": rows,
        },
        path,
    )
    console.print(_table(rows))
    console.print(f"wrote {escape(shown(path))}")


def _table(rows: list[dict[str, Any]]) -> Table:
    peaks = ("peak while\nloading", "of the\nfile", "peak after\ndecoding", "of the\nfile")
    table = Table("", "file", *peaks)
    for row in rows:
        if row["status"] != "measured":
            table.add_row(escape(row["label"]), row["status"], escape(row["reason"]))
            continue
        cells = [size(row["file_bytes"])]
        for key in ("loaded_bytes", "decoded_bytes"):
            cells += [size(row[key]), f"{row[key] / row['file_bytes']:.2f}"]
        table.add_row(escape(row["label"]), *cells)
    return table
