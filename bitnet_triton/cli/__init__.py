"""The command line: one file a command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bitnet_triton import __version__
from bitnet_triton.cli import bench, doctor, generate, pack

app = typer.Typer(
    name="bitnet-triton",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(doctor.doctor)
app.command()(pack.pack)
app.command(context_settings=bench.CONTEXT_SETTINGS)(bench.bench)


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
    logging.getLogger("bitnet_triton").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 1."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
