"""Prove and time every kernel on one device: ``python -m bench.gpu_suite``.

From the root of the checkout; the package need not be installed. First the tests of the kernels
run there (``bench/gpu_tests.py``), then cases of these benchmarks (``bench/gpu_sections.py``).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from bench.case import Case, Point, Settings
from bench.gpu_report import Outcome, Run, print_result, result
from bench.gpu_sections import SECTIONS, Section
from bench.gpu_tests import FOLDERS, default_jobs, run_tests
from bench.measure import Row, measure_point
from bench.options import SCRATCH
from bench.peaks import measure_peaks
from bench.report import RESULTS, point_name, write_json
from bitnet_triton import use_backend

TESTS = "tests"
BUDGET_S, QUICK_BUDGET_S = 540.0, 120.0
# of the time: the tests
_TESTS_SHARE = 0.45
# a quick run would not start anything by a longer guess
_QUICK_GUESS_S = 4.0

Tell = Callable[[str], None]

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def read_settings(device: str, quick: bool, seed: int | None) -> Settings:
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
    short = quick or device == "cpu"
    return Settings(
        device=torch.device(device),
        threads=torch.get_num_threads(),
        rounds=3 if short else 7,
        block_s=0.02 if short else 0.03,
        budget_s=0.5 if short else 3.0,
        # fresh inputs in every run
        seed=random.SystemRandom().randrange(2**31) if seed is None else seed,
    )


def choose(names: Sequence[str]) -> list[str]:
    """Return the names of the parts to run, in order; all of them if there are none.

    Raises:
        ValueError: a name is unknown.
    """
    known = [TESTS, *(section.name for section in SECTIONS)]
    for name in names:
        if name not in known:
            raise ValueError(f"`section`: expected one of {', '.join(known)}, got {name!r}")
    return [name for name in known if not names or name in names]


def default_output(run: Run, partial: bool) -> Path:
    """Return where the JSON goes; what is no full run on a GPU is not for publication."""
    name = "cpu" if run.small else torch.cuda.get_device_name(run.settings.device)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (SCRATCH if partial or run.small else RESULTS) / f"gpu_suite-{name}.json"


def run_suite(
    run: Run, names: Sequence[str], output: Path, tell: Tell, paths: Sequence[str] = FOLDERS
) -> None:
    """Run the parts and write the JSON after each: a run that is killed leaves what it has.

    Args:
        run: how; is filled.
        names: of the parts.
        output: the JSON.
        tell: is told what happens.
        paths: of the tests.
    """
    end = time.monotonic() + run.budget_s
    sections = [section for section in SECTIONS if section.name in names]
    if TESTS in names:
        budget = run.budget_s * (_TESTS_SHARE if sections else 1.0)
        run.tests = run_tests(
            run.settings.device.type, budget_s=budget, seed=run.settings.seed, jobs=run.jobs,
            paths=paths, tell=tell,
        )  # fmt: skip
        for failure in run.tests["failed"]:
            tell(f"FAILED {failure['name']}: {failure['reason']}")
        write_json(result(run), output)
    if sections:
        tell("bandwidth and matrix rates")
        sizes = {"buffer_bytes": 2**26, "size": 512} if run.small else {}
        run.peaks = measure_peaks(run.settings, **sizes)
    for i, section in enumerate(sections):
        now = time.monotonic()
        share = section.weight / sum(each.weight for each in sections[i:])
        deadline = now + min(max(0.0, end - now) * share, section.most_s)
        run.outcomes.append(run_section(section, run, deadline, tell))
        write_json(result(run), output)
        if not run.small:
            torch.cuda.empty_cache()


def run_section(section: Section, run: Run, deadline: float, tell: Tell) -> Outcome:
    """Time the points of a section until its time is up; list those that are left out.

    A point starts if the longest of the section so far would still end in time.
    """
    start, longest = time.monotonic(), section.guess_s
    if run.quick:
        longest = min(longest, _QUICK_GUESS_S)
    case = section.case("tiny" if run.small else "2b4t")
    outcome = Outcome(section.name, case.title, case.unit)
    for i, point in enumerate(section.small if run.small else section.points):
        begun = time.monotonic()
        reason = run.broken
        if not reason and begun + longest > deadline:
            left = max(0.0, deadline - begun)
            reason = f"needs about {longest:.0f} s, {left:.0f} s are left"
        if run.quick and i >= section.quick:
            reason = "not part of --quick"
        if reason:
            outcome.skipped.append({"name": point_name(point), "reason": reason})
            continue
        tell(f"{section.name}: {point_name(point)}")
        rows = _measure(section, case, point, run, seed=run.settings.seed + i)
        outcome.rows += rows
        outcome.flops += [case.flops(**point)] * len(rows)
        run.broken = run.broken or _broken_device(run.settings.device, point)
        taken = time.monotonic() - begun
        longest = taken if not i else max(longest, taken)
    outcome.seconds = time.monotonic() - start
    return outcome


def _measure(section: Section, case: Case, point: Point, run: Run, seed: int) -> list[Row]:
    names = [n for n in section.providers if not (run.quick and n in section.slow)]
    providers = {name: case.providers[name] for name in names}
    settings = replace(run.settings, seed=seed)
    forced = use_backend("triton") if section.forced else contextlib.nullcontext()
    try:
        with forced:
            return measure_point(case, point, providers, settings, run.peaks)
    except Exception as error:  # of the inputs or the reference; a provider's is in its row
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first}"
        return [Row(dict(point), names[0], names[0], status="failed", reason=reason)]


def _broken_device(device: torch.device, after: Point) -> str:
    """Say that a GPU has stopped answering: an illegal access ends every later call as well."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            return f"the device stopped working at {point_name(after)} ({first})"
    return ""


def command_line() -> str:
    """Return how this run was started, without folders."""
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return " ".join(["python -m bench.gpu_suite", *arguments])


@app.command()
def suite(
    section: Annotated[
        list[str] | None, typer.Option(help="Run only this part; repeat for more. See --list.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="The essential part, in two minutes.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto for a GPU if there is one.")] = (
        "auto"
    ),
    budget: Annotated[float, typer.Option(help="Seconds; 0 takes 540, or 120 if quick.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat a run; its seed is in its JSON.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Tests at a time; 0 takes half of the CPUs on cuda, one on cpu.")
    ] = 0,
    test: Annotated[
        list[str] | None, typer.Option(help="A file or folder of tests; repeat for more.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the parts, and stop.")] = False,
) -> None:
    """Run the tests of every kernel on a GPU, then time the kernels beside their peers.

    The exit code is 1 if a kernel is wrong. What does not fit into the time is listed as skipped.

        python -m bench.gpu_suite

        python -m bench.gpu_suite --quick --section tests --section prefill
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if list_:
        console.print(f"{TESTS:<20} {' '.join(FOLDERS)}", highlight=False)
        for each in SECTIONS:
            console.print(f"{each.name:<20} {each.case('tiny').title}", highlight=False)
        return
    start = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s[/]  {escape(what)}", highlight=False)

    names = choose(section or [])
    settings = read_settings(device, quick, seed)
    jobs = jobs or default_jobs(settings.device.type)
    budget_s = budget or (QUICK_BUDGET_S if quick else BUDGET_S)
    run = Run(settings, quick, budget_s, jobs, command_line())
    target = output or default_output(run, quick or bool(section) or bool(test))
    run_suite(run, names, target, tell, test or FOLDERS)
    print_result(result(run), console)
    console.print(f"wrote {escape(os.path.relpath(target))}")
    if run.failed:
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
