"""What the commands that train share: options, a YAML file below them, progress, a table."""

from __future__ import annotations

import functools
import inspect
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

# Options by the attribute of the job that they set; None: as the job has it
Options = dict[str, Any]

Output = Annotated[
    str | None,
    typer.Option(help="Folder of the run; the same command there goes on with it.  [required]"),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", parser=parse_threads, metavar="INTEGER")
]
RUN: Options = {
    "output": Output,
    "model": Annotated[
        str | None,
        typer.Option(
            help="A folder or a name on the Hub; `recall` and `tiny` are embedded.  [recall]"
        ),
    ],
    "config": Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options by name; what the command line says wins."
        ),
    ],
}
SEED: Options = {
    "seed": Annotated[int | None, typer.Option(help="Of documents and training.  [0]")]
}
TEACHER: Options = {
    "self_distill": Annotated[
        bool | None,
        typer.Option(
            "--self-distill/--given-answers",
            help="Take the answers that the model gives with full attention, if they are right, or "
            "those of the data.  [given]",
        ),
    ],
    "answer_tokens": Annotated[
        int | None, typer.Option(help="Most tokens of such an answer to a file's prompt.  [64]")
    ],
}
SCHEDULE: Options = {
    "row": Annotated[
        int | None,
        typer.Option(help="Tokens of a row, packed with documents.  [one document's length]"),
    ],
    "warm_up": Annotated[
        float | None, typer.Option(help="Share of the steps in which the rate rises.  [0.05]")
    ],
    "accumulate": Annotated[int | None, typer.Option(help="Rows of a step.  [1]")],
    "epochs": Annotated[int | None, typer.Option(help="Times that a document is seen.  [1]")],
    "save_every": Annotated[int | None, typer.Option(help="Steps between checkpoints.  [50]")],
}
EVALUATION: Options = {
    "eval_tasks": Annotated[
        list[str] | None,
        typer.Option(
            "--eval-task",
            help="Measured before and after; may be repeated.  [all that are not hard]",
        ),
    ],
    "eval_length": Annotated[int | None, typer.Option(help="Tokens of measured prompts.  [2048]")],
    "eval_samples": Annotated[int | None, typer.Option(help="Prompts of each task.  [20]")],
    "eval_seed": Annotated[int | None, typer.Option(help="Of measured prompts.  [1]")],
}
THREADS: Options = {"threads": Threads}


def documents(*, text: float, tokens: int) -> Options:
    """Return the options that say what is read, with the defaults that a command has for them."""
    return {
        "data": Annotated[
            str | None,
            typer.Option(
                help="`tasks`: retrieval tasks and text, drawn from the seed; a text file; or JSON "
                'lines, each `{"text": ...}` or `{"prompt": ..., "answer": ...}`.  [tasks]'
            ),
        ],
        "text": Annotated[
            float | None, typer.Option(help=f"Share of the tasks that is plain text.  [{text}]")
        ],
        "tokens": Annotated[int | None, typer.Option(help=f"Of all documents.  [{tokens}]")],
        "length": Annotated[int | None, typer.Option(help="Tokens of a document at most.  [1024]")],
        "question": Annotated[
            str | None,
            typer.Option(
                help="The phase of the tasks' questions: `prompt` (as `generate` reads them), "
                "`decode` (as if they were generated) or `both`, in turns.  [both]"
            ),
        ],
    }


def takes(options: Options) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Make a command of a function: typer is told these options, the function what was given.

    Commands share options, and typer reads them off a signature: this writes it.
    """

    def decorate(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            if threads := given.pop("threads", None):
                import torch

                torch.set_num_threads(threads)
            command({name: value for name, value in given.items() if value not in (None, [])})

        signature: Any = run
        signature.__signature__ = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a)
                for name, a in options.items()
            ]
        )
        run.__annotations__ = dict(options)
        return run

    return decorate


def read_job(kind: type[Job], given: dict[str, Any]) -> Job:
    """Return what is asked by flags, and below them by the YAML file that ``config`` names.

    Raises:
        WrongArgumentError: an option is unknown or out of range, or there is no output.
    """
    from bitnet_triton.training.options import check_names, read_yaml

    flags = {name: value for name, value in given.items() if name != "config"}
    try:
        options = read_yaml(given["config"]) if "config" in given else {}
        check_names(options, kind)
        options |= flags
        if "output" not in options:
            raise WrongArgumentError("`--output`: expected a folder for the run, got none")
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise WrongArgumentError(str(error)) from error


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
    _add_losses(table, "loss on held-out documents", losses)
    if trained["merge"]:
        _add_losses(table, "loss, merged", [None] * (len(columns) - 1) + [trained["merge"]["loss"]])
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
            f"and the logits by {100 * merge['logits_change']:.2g} %; the adapters are kept beside "
            f"their model in {job['output']}/beside"
        )
    console.print(f"Wrote {job['output']}/model, report.json and documents.jsonl beside it")


def _add_losses(table: Table, name: str, losses: list[float | None]) -> None:
    table.add_row("", name, *("" if loss is None else f"{loss:.4f}" for loss in losses))


_HARM = ("missed, %", "nats a token")


def _harm(row: dict[str, Any]) -> tuple[str, str]:
    error = "" if row["error"] is None else f" ± {100 * row['error']:.2f}"
    return f"{100 * row['harm']:.2f}{error}", f"{row['loss']:.4f}"


def show_harms(report: dict[str, Any]) -> None:
    """Print what a calibration has found."""
    job = report["run"]
    console.print(
        f"{report['documents']} documents. Full attention misses {100 * report['missed']:.2f} % of "
        f"their answers and has a loss of {report['loss']:.4f} nats a token; added to that:"
    )
    table = Table(title="One layer changed, all others full", title_justify="left")
    for name in ("layer", *_HARM):
        table.add_column(name, justify="right")
    for row in report["layers"]:
        table.add_row(str(row["layer"]), *_harm(row))
    console.print(table)
    table = Table(title="Plans", title_justify="left")
    table.add_column("plan")
    table.add_column("full layers", overflow="fold")
    for name in _HARM:
        table.add_column(name, justify="right")
    for name, plan in report["plans"].items():
        style = "bold" if name == report["chosen"] else None
        full = ", ".join(map(str, plan["full"]))
        table.add_row(name, full, *_harm(plan), style=style)
    console.print(table)
    path = Path(job["output"], "attention.json")
    console.print(f"Wrote {path} ({report['chosen']}), report.json beside it")
