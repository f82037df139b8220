"""The command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from bench.case import Settings
from bench.cases import CASES, make_case
from bench.peers import PEERS
from bench.report import RESULTS, point_name, print_table, read_json
from bench.run import console, plot_file, run_case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Where runs go that are not meant to be published
SCRATCH = Path("runs") / "bench"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Only = Annotated[
    list[str] | None,
    typer.Option(help="Part of the grid, as KEY=VALUE[,VALUE]; repeat for more keys."),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--provider", help="Run only this provider; repeat for more. See --list."),
]
Dtype = Annotated[str, typer.Option(help="Of the inputs: bf16, fp16 or fp32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Threads = Annotated[int, typer.Option(help="PyTorch threads; 0 takes one for each CPU.")]
Rounds = Annotated[int, typer.Option(help="Turns of each provider at each point.")]
Budget = Annotated[float, typer.Option(help="Seconds of timing for one point, roughly.")]
Quick = Annotated[bool, typer.Option(help="Three short rounds: to see that it runs.")]
Seed = Annotated[int, typer.Option(help="Of all random inputs.")]
Output = Annotated[
    Path | None, typer.Option(help="The JSON; a PNG of the same name lies beside it.")
]


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    list_: Annotated[
        bool, typer.Option("--list", help="List cases, providers and peers, and stop.")
    ] = False,
) -> None:
    """Compare bitnet_triton with other ways to compute the same.

    Every provider is checked against a reference first; one that fails is named and not timed.
    The others take turns for several rounds. Results: a table, a JSON with the machine described,
    and a plot drawn from the JSON.

        python -m bench ternary_linear

        python -m bench ternary_linear --only M=1 --only cache=cold --quick

        python -m bench model --layers 4

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


def _settings(
    dtype: str, device: str, threads: int, rounds: int, budget: float, quick: bool, seed: int
) -> Settings:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(
        dtype=DTYPES[dtype],
        device=torch.device(device),
        threads=threads or os.cpu_count() or 1,
        rounds=3 if quick else rounds,
        block_s=0.02 if quick else 0.1,
        budget_s=1.0 if quick else budget,
        seed=seed,
    )


def _parse_only(only: list[str] | None) -> dict[str, list[str]]:
    parsed = {}
    for part in only or []:
        key, separator, values = part.partition("=")
        if not separator or not values:
            raise typer.BadParameter(f"--only: expected KEY=VALUE[,VALUE], got {part!r}")
        parsed[key] = values.split(",")
    return parsed


def _target(name: str, output: Path | None, partial: bool) -> Path:
    if output is not None:
        return output
    return (SCRATCH if partial else RESULTS) / f"{name}.json"


def _op_command(name: str) -> Callable[..., None]:
    def command(
        only: Only = None,
        provider: Names = None,
        dtype: Dtype = "bf16",
        device: Device = "auto",
        threads: Threads = 0,
        rounds: Rounds = 15,
        budget: Budget = 10.0,
        quick: Quick = False,
        seed: Seed = 0,
        output: Output = None,
    ) -> None:
        settings = _settings(dtype, device, threads, rounds, budget, quick, seed)
        target = _target(name, output, bool(quick or only or provider))
        run_case(
            make_case(name), settings, only=_parse_only(only), names=provider or [], output=target
        )

    return command


for _name in ("ternary_linear", "bit_linear", "flash_attention", "int8_linear"):
    app.command(_name, help=CASES[_name].__doc__)(_op_command(_name))


@app.command("model", help=CASES["model"].__doc__)
def _model_command(
    layers: Annotated[
        int, typer.Option(help="How many; 0 takes as many as the free memory allows.")
    ] = 0,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens in the cache before decoding.")] = 64,
    shape: Annotated[str, typer.Option(help="2b4t, or tiny to see that it runs.")] = "2b4t",
    only: Only = None,
    provider: Names = None,
    device: Device = "auto",
    threads: Threads = 0,
    rounds: Rounds = 9,
    budget: Budget = 60.0,
    quick: Quick = False,
    output: Output = None,
) -> None:
    settings = _settings("bf16", device, threads, rounds, budget, quick, 0)
    case = make_case("model", shape=shape, layers=layers or None, prompt=prompt, context=context)
    partial = bool(quick or only or provider or layers or shape != "2b4t")
    target = _target("model", output, partial)
    run_case(case, settings, only=_parse_only(only), names=provider or [], output=target)


@app.command("triton_cpu", help=CASES["triton_cpu"].__doc__)
def _triton_cpu_command(
    shape: Annotated[str, typer.Option(help="full, or tiny to see that it runs.")] = "full",
    interpreter: Annotated[
        bool, typer.Option("--interpreter", help="Compare with Triton's interpreter, on less.")
    ] = False,
    only: Only = None,
    provider: Names = None,
    threads: Threads = 0,
    rounds: Rounds = 15,
    budget: Budget = 10.0,
    quick: Quick = False,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    # The dtypes are part of the grid
    settings = _settings("fp32", "cpu", threads, rounds, budget, quick, seed)
    case = make_case("triton_cpu", shape=shape, interpreter=interpreter)
    partial = bool(quick or only or provider or shape != "full")
    target = _target(case.name, output, partial)
    run_case(case, settings, only=_parse_only(only), names=provider or [], output=target)


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
