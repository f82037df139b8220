"""What the commands that train share: options, a YAML file below them, progress, a table."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bitnet_triton.cli.arguments import WrongArgumentError, parse_threads

Job = TypeVar("Job")
console = Console(highlight=False)

Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with any of these options by name; what the command line says wins."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(help="Folder of the run; the same command there goes on with it.  [required]"),
]
Model = Annotated[
    str | None,
    typer.Option(help="A folder or a name on the Hub; `recall` and `tiny` are embedded.  [recall]"),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="`tasks`: retrieval tasks and text, drawn from the seed; a text file; or JSON lines, "
        'each `{"text": ...}` or `{"prompt": ..., "answer": ...}`.  [tasks]'
    ),
]
Text = Annotated[float | None, typer.Option(help="Share of the tasks that is plain text.  [0.1]")]
Length = Annotated[int | None, typer.Option(help="Tokens of a document at most.  [1024]")]
Row = Annotated[
    int | None,
    typer.Option(help="Tokens of a row, packed with documents.  [one document's length]"),
]
Question = Annotated[
    str | None,
    typer.Option(
        help="The phase of the tasks' questions: `prompt` (as `generate` reads them), `decode` (as "
        "if they were generated) or `both`, in turns.  [both]"
    ),
]
WarmUp = Annotated[
    float | None, typer.Option(help="Share of the steps in which the rate rises.  [0.05]")
]
Accumulate = Annotated[int | None, typer.Option(help="Rows of a step.  [1]")]
Epochs = Annotated[int | None, typer.Option(help="Times that a document is seen.  [1]")]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.  [50]")]
Seed = Annotated[int | None, typer.Option(help="Of documents and training.  [0]")]
EvalTask = Annotated[
    list[str] | None,
    typer.Option(help="Measured before and after; may be repeated.  [all that are not hard]"),
]
EvalLength = Annotated[int | None, typer.Option(help="Tokens of measured prompts.  [2048]")]
EvalSamples = Annotated[int | None, typer.Option(help="Prompts of each task.  [20]")]
EvalSeed = Annotated[int | None, typer.Option(help="Of measured prompts.  [1]")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", parser=parse_threads, metavar="INTEGER")
]


def read_job(kind: type[Job], config: Path | None, flags: dict[str, Any]) -> Job:
    """Return what is asked by flags, and below them by a YAML file.

    Raises:
        WrongArgumentError: an option is unknown or out of range, or there is no output.
    """
    from bitnet_triton import assets
    from bitnet_triton.training.options import check_names, read_yaml

    given = {name: value for name, value in flags.items() if value not in (None, [])}
    try:
        options = {} if config is None else read_yaml(config)
        check_names(options, kind)
        options |= given
        if "output" not in options:
            raise WrongArgumentError("`--output`: expected a folder for the run, got none")
        job = kind(**options)
    except (TypeError, ValueError) as error:
        raise WrongArgumentError(str(error)) from error
    name = job.model  # type: ignore[attr-defined]
    if name in ("recall", "tiny"):
        folder = str(getattr(assets, f"{name.upper()}_MODEL"))
        job = dataclasses.replace(job, model=folder)  # type: ignore[type-var]
    return job


@contextmanager
def bars() -> Iterator[Callable[[str, int, int, float], None]]:
    """Show how far each part of a run is; gives what is told of it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    rows: dict[str, Any] = {}

    def tell(what: str, done: int, total: int, loss: float) -> None:
        if what not in rows:
            rows[what] = progress.add_task(what, total=total)
        with_loss = "" if math.isnan(loss) else f"  loss {loss:.4f}"
        is_kept = what == "train"
        progress.update(
            rows[what],
            completed=done,
            description=what + with_loss,
            visible=is_kept or done < total,
        )

    try:
        with warnings.catch_warnings(), progress:
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by former names
            yield tell
    finally:
        transformers.utils.logging.enable_progress_bar()


def show(report: dict[str, Any]) -> None:
    """Print what a run has changed."""
    job, trained = report["run"], report["training"]
    console.print(
        f"{trained['tokens']} tokens in {report['documents']} documents, {trained['steps']} steps; "
        f"{trained['trained']} parameters ({trained['what']}) were trained"
    )
    if report["answers"]:
        answers = report["answers"]
        console.print(
            f"{answers['right']} of the model's own {answers['asked']} answers were right, and kept"
        )
    before, after = report["before"], report["after"]
    columns = {"full": before["full"]} if "full" in before else {}
    columns |= {"before": before["adapted"]} if "adapted" in before else {}
    columns["after"] = after["adapted"]
    table = Table(
        title=f"{job['attention']}: accuracy at {job['eval_length']} tokens, in %; "
        f"{job['eval_samples']} prompts of each task",
        title_justify="left",
    )
    table.add_column("question")
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for phase, tasks in after["adapted"]["accuracy"].items():
        for task in tasks:
            cells = [
                f"{100 * row['accuracy'][phase][task]['mean']:.1f}" for row in columns.values()
            ]
            table.add_row(phase, task, *cells)
    table.add_row("", "bits per byte", *(f"{row['bits_per_byte']:.4f}" for row in columns.values()))
    losses = [trained.get(f"loss_{name}") for name in columns]
    cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
    table.add_row("", "loss on held-out documents", *cells)
    console.print(table)
    if trained.get("transfer"):
        errors = trained["transfer"]
        console.print(
            f"Layer by layer, {len(errors)} steps brought the error of new layers from "
            f"{errors[0]:.3g} to {errors[-1]:.3g} of the spread of what full attention gave"
        )
    if trained["merge"]:
        merge = trained["merge"]
        console.print(
            f"Merging changed {100 * merge['changed_codes']:.2f} % of the codes of adapted layers, "
            f"and the logits by {100 * merge['logits_change']:.2g} %"
        )
    console.print(f"Wrote {job['output']}/model, report.json and documents.jsonl beside it")
