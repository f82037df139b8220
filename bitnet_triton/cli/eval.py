"""``bitnet-triton eval``: what a model still finds and predicts, and what it reads for that."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bitnet_triton.cli.arguments import WrongArgumentError
from bitnet_triton.cli.attention import check_attention
from bitnet_triton.cli.checkpoint import find_checkpoint, read_config

if TYPE_CHECKING:
    from bitnet_triton.training import Report

console = Console(highlight=False)


def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="A folder or a name on the Hub; `recall` and `tiny` are the embedded models."
        ),
    ] = "recall",
    task: Annotated[
        list[str] | None, typer.Option(help="One of several.  [default: all tasks]")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt; may be repeated.")
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Where the fact stands, 0 to 1.  [default: .1 .3 .5 .7 .9]"
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="A mode or preset, with settings as in `sliding:window=256,sinks=4`, or JSON, or "
            "a `.json` file; may be repeated.  [default: as in the checkpoint]"
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="`own` (of the attention), `dynamic`, `static`, or a memory with settings as in "
            "`h2o:budget=0.2`; may be repeated."
        ),
    ] = None,
    rope: Annotated[
        list[str] | None,
        typer.Option(help="Changed rope parameters, `yarn:factor=4` or JSON; may be repeated."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    question: Annotated[
        str,
        typer.Option(help="`prompt`: read with the prompt; `decode`: as if it were generated."),
    ] = "prompt",
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="Measure the loss on held-out text as well.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON and plots; a run that was killed goes on there."),
    ] = None,
) -> None:
    """Measure what a model recalls and predicts, for every attention x cache x rope that is listed.

    Accuracy on seeded tasks by length and depth, hard tasks apart; bits per byte of held-out text;
    and, counted by trying them out, the keys that a generated token reads and the bytes that a
    cache holds.

    **Examples**

    - `bitnet-triton eval`

    - `bitnet-triton eval --length 4096 --attention full --attention sliding:window=256 --attention
      top_k:keys=41 --output runs/modes`

    - `bitnet-triton eval --task needles --length 1024 --rope yarn:factor=4 --question decode`
    """
    found = find_checkpoint(model, "--model", tokenizer=True)
    if output is not None and output.exists() and not output.is_dir():
        raise WrongArgumentError(f"`--output`: expected a folder, got {output}, a file")

    import torch

    from bitnet_triton.training import combine
    from bitnet_triton.training import evaluate as measure
    from bitnet_triton.training.evaluation import DEPTHS

    with _in_words_of_options():
        settings = combine(attention or [], cache or [], rope or [])
    config = read_config(found, model, "--model")
    for setting in settings:
        check_attention(setting.attention, config)
    if threads:
        torch.set_num_threads(threads)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with bars, _in_words_of_options():
        rows: dict[tuple[str, str, int], Any] = {}

        def tell(setting: str, what: str, tokens: int, done: int, total: int) -> None:
            key = (setting, what, tokens)
            if key not in rows:
                rows[key] = bars.add_task(f"{setting}  {what}  {tokens}", total=total)
            bars.update(rows[key], completed=done, visible=done < total)

        report = measure(
            found, task, length or [2048], DEPTHS if depth is None else depth, settings,
            samples=samples, seed=seed, question=question, text=text, batch_size=batch_size,
            output=output, progress=tell,
        )  # fmt: skip
    for tokens in sorted(report.run["lengths"]):
        if report.run["tasks"]:
            console.print(_scores(report, tokens))
        console.print(_costs(report, tokens))
    if output is not None:
        _save(report, output)


@contextmanager
def _in_words_of_options() -> Iterator[None]:
    """Let an error about a setting name its option, in the words of other commands."""
    try:
        yield
    except (TypeError, ValueError) as error:
        told = re.sub(r"^`settings`: .*?: (?=`(attention|cache|rope)`: )", "", str(error))
        if not re.match(r"`(attention|cache|rope)`: ", told):
            raise
        raise WrongArgumentError(f"`--{told[1:]}") from error


def _scores(report: Report, length: int) -> Table:
    """Return the accuracy of each task, a column for each setting."""
    from bitnet_triton.training.tasks import TASKS

    settings = [setting["name"] for setting in report.run["settings"]]
    table = Table(
        title=f"Accuracy at {length} tokens, in %; {report.run['samples']} prompts each, 95 % "
        "intervals",
        title_justify="left",
    )
    table.add_column("task")
    table.add_column("chance", justify="right", style="dim")
    for setting in settings:
        table.add_column(setting, justify="right", overflow="fold")
    for name in sorted(report.run["tasks"], key=lambda name: TASKS[name].hard):
        found = [report.scores[setting][name][length] for setting in settings]
        cells = [f"{100 * s.mean:.1f} [dim]{100 * s.low:.0f}-{100 * s.high:.0f}[/]" for s in found]
        hard = TASKS[name].hard
        table.add_row(
            f"{name}{' (hard)' if hard else ''}", f"{100 * TASKS[name].chance:.1f}", *cells
        )
    return table


def _costs(report: Report, length: int) -> Table:
    """Return what each setting reads, holds and predicts, a row for each."""
    from bitnet_triton.training.plots import mean_score

    table = Table(title=f"Costs at {length} tokens, counted", title_justify="left")
    table.add_column("setting", overflow="fold")
    columns = ("mean %", "mean % hard", "bits/byte", "keys read", "scored", "cache kB", "s")
    for name in columns:
        table.add_column(name, justify="right")
    for setting in [setting["name"] for setting in report.run["settings"]]:
        means = [mean_score(report, setting, length, hard=hard) for hard in (False, True)]
        text = report.text.get(setting, {}).get(length)
        cost = report.footprints[setting][length]
        table.add_row(
            setting,
            *("" if mean is None else f"{100 * mean:.1f}" for mean in means),
            "" if text is None else f"{text['bits_per_byte']:.3f}",
            f"{cost['rows_decode']:.1f}",
            f"{cost['scored_decode']:.0f}",
            f"{cost['cache_bytes'] / 1000:.0f}",
            f"{report.seconds.get(setting, 0):.0f}",
        )
    return table


def _save(report: Report, folder: Path) -> None:
    """Write ``report.json`` and the plots."""
    from bitnet_triton.training.plots import plot

    command = shlex.join(["bitnet-triton", *sys.argv[1:]])
    path = folder / "report.json"
    data = {"command": command, **dataclasses.asdict(report)}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    try:
        written = [path, *plot(report, folder)]
    except ImportError as error:
        written = [path]
        console.print(f"[yellow]No plots:[/] {error}")
    console.print("Wrote " + ", ".join(map(str, written)))
