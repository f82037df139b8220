"""``bitnet-triton longrope``: search by what a model's frequencies are divided for longer texts."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from bitnet_triton.cli import training as options


def longrope(
    output: options.Output = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder or a name on the Hub; `recall` and `tiny` are embedded.  [recall]"
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file to search on; may be repeated. Keep others to judge by."),
    ] = None,
    factor: Annotated[
        float | None, typer.Option(help="How many times the trained length.  [8]")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a text.  [trained length x factor]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Texts a candidate reads.  [5]")] = None,
    fitness: Annotated[
        str | None,
        typer.Option(
            help="`text`: the loss of all tokens; `needles`: that of answers to what a text hid "
            "far back.  [text]"
        ),
    ] = None,
    population: Annotated[int | None, typer.Option(help="Of a generation.  [64]")] = None,
    generations: Annotated[int | None, typer.Option(help="After the first one.  [40]")] = None,
    recover: Annotated[
        bool | None,
        typer.Option(
            "--recover/--as-trained",
            help="Search factors for texts within the trained length too, or leave those as they "
            "were read in training.  [as trained]",
        ),
    ] = None,
    attention_factor: Annotated[
        float | None,
        typer.Option(
            help="Multiplies cosines and sines, for short texts too.  [sqrt(1 + ln factor / ln "
            "trained length)]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws.  [0]")] = None,
    threads: options.Threads = None,
) -> None:
    """Search by what each frequency is divided, so that a model reads longer texts (LongRoPE).

    Lists that never fall evolve (arXiv:2402.13753), from those of PI, NTK and YaRN on; a candidate
    costs one reading of some texts, no training. The result is a copy of the checkpoint, with the
    type `longrope` in its config, which transformers reads without this package. A run that was
    killed goes on with the same command, to the same result.

    **Examples**

    - `bitnet-triton longrope --model tiny --factor 8 --text notes.txt --text book.txt --output
      runs/longer`

    - `bitnet-triton longrope --fitness needles --samples 3 --generations 10 --recover
      --output runs/needles`
    """
    import torch

    from bitnet_triton.training.longrope import LongRopeJob, search_longrope

    flags = {
        "model": model, "output": output, "texts": text, "factor": factor, "length": length,
        "samples": samples, "fitness": fitness, "population": population,
        "generations": generations, "recover": recover, "attention_factor": attention_factor,
        "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    job = options.read_job(LongRopeJob, given)
    if threads:
        torch.set_num_threads(threads)
    with options.bars() as tell:
        report = search_longrope(job, tell)
    _show(report, job.output)


def _show(report: dict[str, Any], output: str) -> None:
    """Print what the search has found."""
    table = Table(title="nats a token, on the texts of the search", title_justify="left")
    table.add_column("factors")
    stages = [name for name in ("long", "short") if name in report]
    for name in stages:
        table.add_column(f"{name} texts", justify="right")
    names = list(dict.fromkeys(who for name in stages for who in report[name]["seeds"]))
    rows = {who: [report[name]["seeds"].get(who) for name in stages] for who in names}
    rows["searched"] = [report[name]["loss"] for name in stages]
    for who, losses in rows.items():
        table.add_row(who, *("" if loss is None else f"{loss:.4f}" for loss in losses))
    options.console.print(table)
    options.console.print(f"Wrote {output}/model, and {output}/report.json")
