"""``bitnet-triton doctor``: what runs where on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitnet_triton.cli.arguments import check_forced_backend

if TYPE_CHECKING:
    import torch

console = Console(highlight=False)


def doctor(
    check: Annotated[
        bool,
        typer.Option(help="Run every op on every backend and compare it with the reference."),
    ] = False,
) -> None:
    """Say what runs where on this machine, and why.

    For each op and device: the backend that is chosen, and what keeps the ones before it from
    running. Nothing is changed.

    **Examples**

    - `bitnet-triton doctor`

    - `bitnet-triton doctor --check`

    - `BITNET_TRITON_BACKEND=reference bitnet-triton doctor`
    """
    check_forced_backend()
    _print_versions()
    devices = _devices()
    _print_machine(devices)
    _print_choices(devices)
    if check and not _print_checks(devices):
        raise typer.Exit(1)


def _print_versions() -> None:
    import bitnet_triton

    console.print(f"[bold]bitnet_triton {bitnet_triton.__version__}[/]")
    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "transformers"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "[yellow]not installed[/]"
        table.add_row(package, version)
    console.print(table)


def _devices() -> list[torch.device]:
    import torch

    devices = [torch.device("cpu")]
    return devices + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _print_machine(devices: list[torch.device]) -> None:
    import torch

    from bitnet_triton.runtime.device import cpp_compiler, cpu_capability

    table = Table.grid(padding=(0, 2))
    table.add_row(
        "cpu", f"{platform.machine()}, {cpu_capability()}, {torch.get_num_threads()} threads"
    )
    hint = crowding(torch.get_num_threads(), len(os.sched_getaffinity(0)), os.getloadavg()[0])
    if hint:
        table.add_row("", f"[yellow]{hint}[/]")
    compiler = cpp_compiler()
    table.add_row("C++ compiler", _first_line(compiler) if compiler else "[yellow]none[/]")
    _add_triton_cpu(table)
    for device in devices[1:]:
        found = torch.cuda.get_device_properties(device)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        table.add_row(str(device), f"{found.name}, sm_{found.major}{found.minor}, {memory}")
    if len(devices) == 1:
        table.add_row("gpu", "none that torch can use")
    console.print("\n[bold]Machine[/]")
    console.print(table)


def crowding(threads: int, cores: int, load: float) -> str | None:
    """Say what to do where other programs leave fewer cores free than there are threads.

    A parallel region ends with its slowest thread, and those that wait for it spin on cores that
    others need.

    Args:
        threads: how many this process would use.
        cores: how many it may run on.
        load: how many processes want to run, on average over the last minute.
    """
    free = max(cores - load, 0.0)
    if threads < 2 or threads <= free + 0.5:  # half a core is noise, this process included
        return None
    return (
        f"busy: {threads} threads on {cores} cores, of which {free:.1f} are free (load average "
        f"{load:.1f}); fewer threads, or OMP_WAIT_POLICY=passive, will be faster"
    )


def _add_triton_cpu(table: Table) -> None:
    """Say with what Triton kernels are compiled for the CPU, and where they are kept."""
    from bitnet_triton import triton_cpu

    report = triton_cpu.report()
    if report.objection is not None:
        table.add_row("triton on cpu", f"[yellow]{escape(report.objection)}[/]")
        return
    table.add_row("triton on cpu", report.compiler)
    table.add_row("", f"instruction sets: {', '.join(report.features) or 'no special ones'}")
    table.add_row("", f"compiled kernels: {report.cache}, {report.cache_bytes / 2**20:.1f} MiB")
    if report.real_triton_cpu:
        table.add_row("", "the project triton-cpu is installed as well")


def _first_line(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), compiler)


def _print_choices(devices: list[torch.device]) -> None:
    from bitnet_triton.kernels import IMPLEMENTATIONS
    from bitnet_triton.runtime import explain, forced_backend

    forced = forced_backend()
    console.print("\n[bold]Backends[/]" + (f" (forced: {forced})" if forced else ""))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("op")
    for device in devices:
        table.add_column(str(device))
    reasons: dict[str, None] = {}
    for op, implementations in IMPLEMENTATIONS.items():
        cells = []
        for device in devices:
            found = explain(op, implementations, device)
            chosen = next((backend for backend, why_not in found if why_not is None), None)
            cells.append(f"[green]{chosen}[/]" if chosen else "[red]nothing can run[/]")
            for backend, why_not in found:
                if backend == chosen:
                    break
                reasons[f"{backend} on {device}: {why_not}"] = None
        table.add_row(op, *cells)
    console.print(table)
    for reason in reasons:
        console.print(f"[dim]not {reason}[/]")


def _print_checks(devices: list[torch.device]) -> bool:
    """Compare every backend of ``ternary_linear`` and ``bit_linear`` with the reference."""
    from bitnet_triton.runtime import BACKENDS, backend_objection

    console.print("\n[bold]Checks[/] against the reference, forward and backward")
    fine = True
    for device in devices:
        for backend in BACKENDS:
            if backend_objection(backend, device) is None:
                with console.status(f"Compiling and running {backend} on {device}"):
                    error = _worst_error(backend, device)
                ok = error < 1e-4
                fine &= ok
                word = "[green]agrees[/]" if ok else "[red]DIFFERS[/]"
                console.print(f"{backend} on {device}: {word}, relative error {error:.1e}")
    return fine


def _worst_error(backend: str, device: torch.device) -> float:
    """Return the largest relative error of outputs and gradients, one row and many rows."""
    import torch

    from bitnet_triton import use_backend
    from bitnet_triton.kernels import TernaryWeight, bit_linear, ternary_linear

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (96, 200), generator=generator).to(torch.int8)
    packed = TernaryWeight.from_codes(codes, 0.02).to(device)
    masters = torch.randn(96, 200, generator=generator).to(device)
    inputs = [torch.randn(rows, 200, generator=generator).to(device) for rows in (1, 33)]

    def run(name: str) -> list[torch.Tensor]:
        results = []
        for values in inputs:
            x, w = values.clone().requires_grad_(), masters.clone().requires_grad_()
            with use_backend(name):
                y = ternary_linear(x, packed) + bit_linear(x, w)
                y.square().sum().backward()
            assert x.grad is not None
            assert w.grad is not None
            results += [y.detach(), x.grad, w.grad]
        return results

    pairs = zip(run(backend), run("reference"))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)
