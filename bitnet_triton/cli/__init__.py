"""The command line: one file a command."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from bitnet_triton import __version__
from bitnet_triton.cli import (
    adapt,
    bench,
    calibrate,
    distill,
    doctor,
    eval,
    generate,
    longrope,
    pack,
    run,
    serve,
    train,
)
from bitnet_triton.cli.arguments import WrongArgumentError

app = typer.Typer(
    name="bitnet-triton",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(doctor.doctor)
app.command()(pack.pack)
app.command(context_settings=run.CONTEXT_SETTINGS)(run.run)
app.command("eval")(eval.evaluate)
app.command()(adapt.adapt)
app.command()(calibrate.calibrate)
app.command()(distill.distill)
app.command()(longrope.longrope)
app.command()(train.train)
app.command(context_settings=bench.CONTEXT_SETTINGS)(bench.bench)

# What typer raises for a command line that it cannot parse; typer exports only the classes below
_CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what runs where; show tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Ternary (BitNet b1.58) language models, fast on GPU and CPU.

    First steps: `bitnet-triton generate` writes with the embedded model, `bitnet-triton doctor`
    says what this machine can run.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("bitnet_triton").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the command line.

    A wrong argument is one line and exit code 2, anything else that the user can mend one line and
    exit code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is no error
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(prog_name="bitnet-triton", standalone_mode=False) or 0)
    except WrongArgumentError as error:
        _stop(error, str(error), 2)
    except _CommandLineError as error:
        _stop(error, error.format_message(), error.exit_code)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        _stop(error, str(error) or type(error).__name__, 1)


def _stop(error: Exception, message: str, code: int) -> NoReturn:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        raise error
    if message.strip():  # without arguments typer has shown the help
        line = f"[bold red]Error:[/] {escape(' '.join(message.split()))}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    sys.exit(code)
