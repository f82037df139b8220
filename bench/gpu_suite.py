"""Prove and time every kernel on one device: ``python -m bench.gpu_suite``.

From the root of the checkout; the package need not be installed.
"""

from __future__ import annotations

import os

# cuBLAS reads it when it starts; checks run with deterministic algorithms
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from bench.case import Settings
from bench.peaks import measure_peaks
from bench.report import RESULTS, write_json
from bench.suite import SECTIONS
from bench.suite.plan import (
    Clock,
    Outcome,
    Plan,
    Section,
    Tell,
    broken_device,
    run_section,
    skipped_section,
)
from bench.suite.show import print_result, result
from bench.suite.workers import Workers, default_jobs

# Where runs go that are not meant to be published
SCRATCH = Path("runs") / "bench"
BUDGET_S, QUICK_BUDGET_S = 540.0, 120.0

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def choose_sections(names: Sequence[str]) -> list[Section]:
    """Return the sections called ``names``, all of them if there are none.

    Raises:
        ValueError: a name is unknown.
    """
    known = [section.name for section in SECTIONS]
    for name in names:
        if name not in known:
            raise ValueError(f"`section`: expected one of {', '.join(known)}, got {name!r}")
    return [section for section in SECTIONS if not names or section.name in names]


def make_plan(device: str, quick: bool, seed: int | None) -> Plan:
    """Return how to measure on ``device``: "cpu", "cuda" (the current one), or "auto".

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device`: expected cpu, cuda or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device`: PyTorch sees no GPU here")
    chosen = torch.device(device)
    short = quick or chosen.type == "cpu"
    settings = Settings(
        device=chosen,
        threads=torch.get_num_threads(),
        rounds=3 if short else 7,
        block_s=0.02 if short else 0.03,
        budget_s=0.5 if short else 3.0,
        # fresh inputs in every run
        seed=random.SystemRandom().randrange(2**31) if seed is None else seed,
    )
    return Plan(settings, quick)


def default_output(plan: Plan, partial: bool) -> Path:
    """Return where the JSON goes; what is no full run on a GPU is not for publication."""
    if plan.small:
        name = "cpu"
    else:
        gpu = torch.cuda.get_device_name(plan.device)
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return (SCRATCH if partial or plan.small else RESULTS) / f"gpu_suite-{name}.json"


def run_suite(
    plan: Plan,
    sections: Sequence[Section],
    budget_s: float,
    output: Path,
    tell: Tell,
    jobs: int = 1,
) -> list[Outcome]:
    """Run sections and write the JSON after each: a run that is killed leaves what it has.

    Args:
        plan: how.
        sections: what.
        budget_s: for all of them.
        output: the JSON.
        tell: is told what happens.
        jobs: processes that check; timings are taken one after the other, when these have ended.
    """
    clock, outcomes, workers = Clock(budget_s, sections), [], Workers(plan, jobs)
    try:
        for section in sections:
            deadline = clock.next_deadline()
            if section.kind == "check" and jobs > 1:
                outcomes.append(workers.run_section(section, deadline, tell))
            else:
                workers.close()
                _measure_limits(section, plan, tell)
                outcomes.append(run_section(section, plan, deadline, tell))
            write_json(result(plan, command_line(), budget_s, outcomes), output)
            if broken := broken_device(plan.device, section.name):
                tell(broken)
                left = sections[len(outcomes) :]
                outcomes += [skipped_section(each, broken) for each in left]
                write_json(result(plan, command_line(), budget_s, outcomes), output)
                break
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        workers.close()
    return outcomes


def _measure_limits(section: Section, plan: Plan, tell: Tell) -> None:
    """Measure what the device can do before the first timing; on a CPU on little memory."""
    if section.kind == "speed" and plan.peaks is None:
        tell("bandwidth and matrix rates")
        sizes = {"buffer_bytes": 2**26, "size": 512} if plan.small else {}
        plan.peaks = measure_peaks(plan.settings, **sizes)


def command_line() -> str:
    """Return how this run was started, without folders."""
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return " ".join(["python -m bench.gpu_suite", *arguments])


@app.command()
def suite(
    section: Annotated[
        list[str] | None, typer.Option(help="Run only this section; repeat for more. See --list.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="The essential part, in two minutes.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto for a GPU if there is one.")] = (
        "auto"
    ),
    budget: Annotated[float, typer.Option(help="Seconds; 0 takes 540, or 120 if quick.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat a run; its seed is in its JSON.")] = None,
    jobs: Annotated[
        int,
        typer.Option(help="Processes that check; 0 takes half of the CPUs on cuda, one on cpu."),
    ] = 0,
    list_: Annotated[bool, typer.Option("--list", help="List the sections, and stop.")] = False,
) -> None:
    """Check every kernel against float64 on fresh inputs, then time it beside its peers.

    The exit code is 1 if a kernel is wrong. What does not fit into the time is listed as skipped.

        python -m bench.gpu_suite

        python -m bench.gpu_suite --quick --section linears --section prefill
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if list_:
        for each in SECTIONS:
            console.print(f"{each.name:<20} {each.kind:<6} {each.title}", highlight=False)
        return
    start = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s[/]  {escape(what)}", highlight=False)

    chosen, plan = choose_sections(section or []), make_plan(device, quick, seed)
    target = output or default_output(plan, quick or bool(section))
    budget_s = budget or (QUICK_BUDGET_S if quick else BUDGET_S)
    outcomes = run_suite(plan, chosen, budget_s, target, tell, jobs or default_jobs(plan.device))
    print_result(result(plan, command_line(), budget_s, outcomes), console)
    console.print(f"wrote {escape(os.path.relpath(target))}")
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend is one line and exit code 2."""
    try:
        app(arguments, prog_name="python -m bench.gpu_suite")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
