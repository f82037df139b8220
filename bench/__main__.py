"""The command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bench.cases import CASES, attention_modes, make_case
from bench.eviction_command import eviction_command
from bench.footprint_command import footprint_command
from bench.grid import steps
from bench.options import (
    Budget,
    Device,
    Dtypes,
    Names,
    Only,
    Output,
    Quick,
    Rounds,
    Seed,
    Shapes,
    Threads,
    read_dtypes,
    read_only,
    read_settings,
    read_threads,
    target,
    with_shapes,
)
from bench.peers import PEERS
from bench.report import point_name, read_json
from bench.reversible import reversible_command
from bench.run import console, plot_file, run_case
from bench.serving_memory import serving_memory_command
from bench.table import print_table
from bench.training_memory_command import training_memory_command
from bench.tune_command import tune_command

# Threads of llama.cpp go on spinning after a call, for up to a tenth of a second
_MODEL_PAUSE_S = 0.2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    list_: Annotated[
        bool, typer.Option("--list", help="List cases, providers and peers, and stop.")
    ] = False,
) -> None:
    """Compare bitnet_triton with other ways to compute the same.

    Every provider is checked against a reference first; one that fails is named and not timed, one
    that is not installed is named with what to install. The others take turns for several rounds.
    Results: a table, a JSON with the machine described, and a plot drawn from the JSON.

    What is there to compare, with whom, on which shapes:

        python -m bench --list

    Your own shapes, two dtypes, one and two threads, ours beside a plain product:

        python -m bench ternary_linear --shape M=1,K=4096,N=14336 --shape M=64,K=4096,N=14336
        --dtype bf16 --dtype fp32 --threads 1 --threads 2
        --provider bitnet_triton --provider torch_bf16

    A part of the published grid, shortly:

        python -m bench ternary_linear --only M=1 --only cache=cold --quick

    Whole models, with llama.cpp where llama-cpp-python and gguf are installed:

        python -m bench model --layers 4

        python -m bench model --attention full --attention sliding,window=1024

    The table and the plot of a result once more:

        python -m bench plot bench/results/model.json
    """
    if list_:
        _print_list()
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print("nothing to do; see `python -m bench --help`")
        raise typer.Exit(2)


def _print_list() -> None:
    for name in CASES:
        case = make_case(name)
        console.print(f"[bold cyan]{name}[/]  {escape(case.title)}")
        for key, provider in case.providers.items():
            extra = "" if provider.default else ", only when named"
            note = f" ({provider.note}{extra})" if provider.note else ""
            console.print(f"  --provider {key:<20} {escape(provider.label + note)}")
        for point in case.grid:
            console.print(f"  [dim]{escape(point_name(point))}[/]")
    console.print("[bold cyan]peers[/]")
    for peer in PEERS:
        console.print(f"  {peer.name:<14} {escape(peer.state())}")


def _op_command(name: str) -> Callable[..., None]:
    def command(
        shape: Shapes = None,
        only: Only = None,
        provider: Names = None,
        dtype: Dtypes = None,
        device: Device = "auto",
        threads: Threads = None,
        rounds: Rounds = 15,
        budget: Budget = 10.0,
        quick: Quick = False,
        seed: Seed = 0,
        output: Output = None,
    ) -> None:
        case, parts = with_shapes(make_case(name), shape), read_only(only)
        dtypes = read_dtypes(dtype)
        if "dtype" in case.grid[0]:  # its dtypes are part of the grid
            dtypes, parts = ["bf16"], parts | ({"dtype": dtypes} if dtype else {})
        settings = read_settings(device, rounds, budget, quick, seed)
        points = steps(case.select_points(parts), settings, dtypes, read_threads(threads))
        partial = bool(quick or shape or parts or provider)
        run_case(case, points, provider or [], target(name, output, partial))

    return command


for _name in CASES.keys() - {"model", "triton_cpu"}:
    app.command(_name, help=CASES[_name].__doc__)(_op_command(_name))


@app.command("model", help=CASES["model"].__doc__)
def _model_command(  # noqa: PLR0913 - each is an option
    layers: Annotated[
        int, typer.Option(help="How many; 0 takes as many as the free memory allows.")
    ] = 0,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 512,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens in the cache before decoding; repeat for more.",
            show_default="512 and 4096",
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="2b4t, or tiny to see that it runs.")] = "2b4t",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare decode steps of this attention mode, as sliding,window=1024; repeat for "
            "more; `all` takes one of each. Four layers and 4096 cached tokens unless named.",
        ),
    ] = None,
    only: Only = None,
    provider: Names = None,
    device: Device = "auto",
    threads: Threads = None,
    rounds: Rounds = 9,
    budget: Budget = 20.0,
    quick: Quick = False,
    output: Output = None,
) -> None:
    options = {"shape": shape, "layers": layers or None}
    if attention:
        modes = attention_modes.DEFAULT if attention == ["all"] else attention
        case = attention_modes.case(**options, contexts=context or [4096], attention=modes)
    else:
        case = make_case("model", **options, prompt=prompt, contexts=context or [512, 4096])
    settings = read_settings(device, rounds, budget, quick, pause=_MODEL_PAUSE_S)
    points = steps(case.select_points(read_only(only)), settings, ["bf16"], read_threads(threads))
    partial = bool(quick or only or provider or layers or context or shape != "2b4t")
    partial = partial or bool(attention and attention != ["all"])
    run_case(case, points, provider or [], target(case.name, output, partial))


@app.command("triton_cpu", help=CASES["triton_cpu"].__doc__)
def _triton_cpu_command(
    shape: Annotated[str, typer.Option(help="full, or tiny to see that it runs.")] = "full",
    interpreter: Annotated[
        bool, typer.Option("--interpreter", help="Compare with Triton's interpreter, on less.")
    ] = False,
    only: Only = None,
    provider: Names = None,
    threads: Threads = None,
    rounds: Rounds = 15,
    budget: Budget = 10.0,
    quick: Quick = False,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    case = make_case("triton_cpu", shape=shape, interpreter=interpreter)
    settings = read_settings("cpu", rounds, budget, quick, seed)
    # The dtypes are part of the grid
    points = steps(case.select_points(read_only(only)), settings, ["fp32"], read_threads(threads))
    partial = bool(quick or only or provider or shape != "full")
    run_case(case, points, provider or [], target(case.name, output, partial))


app.command("tune")(tune_command)


app.command("footprint")(footprint_command)
app.command("eviction")(eviction_command)
app.command("training_memory")(training_memory_command)
app.command("reversible")(reversible_command)
app.command("serving_memory")(serving_memory_command)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A JSON that a benchmark wrote.")],
    output: Annotated[Path | None, typer.Option(help="The image. Default: FILE.png")] = None,
) -> None:
    """Draw a result again from its JSON, and print its table.

    Example: `python -m bench plot bench/results/model.json`
    """
    data = read_json(file)
    print_table(data, console)
    plot_file(file, output or file.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None, program: str = "python -m bench") -> None:
    """Run the command line; what the user can mend is one line and exit code 1.

    Args:
        arguments: what follows the program's name; None for those of this process.
        program: the name that help texts show.
    """
    try:
        app(arguments, prog_name=program)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
