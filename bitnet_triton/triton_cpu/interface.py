"""Run Triton kernels on CPU tensors: beside another driver, or as Triton's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bitnet_triton.triton_cpu import compat
from bitnet_triton.triton_cpu.errors import CacheError, ToolchainError

if TYPE_CHECKING:
    from bitnet_triton.triton_cpu.graph import Graph

_previous: list[Any] = []


@functools.cache
def _side() -> ModuleType:
    """Import what imports Triton, at the first launch."""
    from bitnet_triton.triton_cpu import side

    return side


def launch(kernel: Any, grid: Any) -> Callable[..., Any]:
    """Return a callable that runs ``kernel`` over ``grid`` on CPU tensors, and waits for it.

    Whatever driver is active in Triton stays active: launches on a GPU go on as before.

    Args:
        kernel: a function under ``triton.jit``, ``triton.autotune`` or ``triton.heuristics``.
        grid: one to three sizes, or a function of the bound arguments that returns them.

    Returns:
        A callable that takes what ``kernel[grid]`` takes.
    """
    return functools.partial(_side().prepared(kernel).run, grid=grid, warmup=False)


def capture() -> AbstractContextManager[Graph]:
    """Record the launches of a with block, which run as they would without, as a graph.

    ``graph.replay()`` runs them again, on the same tensors, without Python in between: some 2
    microseconds a launch. Inside the block PyTorch may allocate and view memory; any other
    operation would be missing from a replay, and is refused.

    Returns:
        A context manager whose ``with ... as`` gives the graph, complete at the end of the block.

    Raises:
        RuntimeError: on entering, if captures are nested or kernels are interpreted; inside, if
            PyTorch computes something.
    """
    from bitnet_triton.triton_cpu import graph

    return graph.capture()


def warmup(kernel: Any, *args: Any, grid: Any = (1,), **kwargs: Any) -> Any:
    """Compile ``kernel`` for these arguments without running it.

    Args:
        kernel: as for ``launch``.
        *args: tensors or dtypes of torch in place of them, and scalars.
        grid: is not looked at.
        **kwargs: constants and options.

    Returns:
        What Triton's ``kernel.warmup`` returns: the compiled kernel, a list under autotune.
    """
    return _side().prepared(kernel).warmup(*args, grid=grid, **kwargs)


def install() -> None:
    """Make the CPU Triton's active driver: ``kernel[grid](...)`` then takes CPU tensors.

    Raises:
        RuntimeError: kernels cannot be compiled here; the message says why.
    """
    from bitnet_triton.triton_cpu.driver import CPUDriver

    if isinstance(compat.active_driver(), CPUDriver):
        return
    why_not = objection()
    if why_not is not None:
        raise RuntimeError(f"cannot run Triton kernels on the CPU: {why_not}")
    _side().register()
    _previous.append(compat.active_driver())
    compat.set_active_driver(CPUDriver())


def uninstall() -> None:
    """Give Triton the driver back that was active before ``install``."""
    from bitnet_triton.triton_cpu.driver import CPUDriver, forget_kernels

    if not _previous:
        return
    previous = _previous.pop()
    if isinstance(compat.active_driver(), CPUDriver):
        forget_kernels()
        compat.set_active_driver(previous)


@functools.cache
def objection() -> str | None:
    """Say why Triton kernels cannot run on the CPU here; None when they can.

    Looks for Triton and a C++ compiler. A version of Triton that the tests have not seen also has
    to run a small kernel.
    """
    why_not = compat.supported()
    if why_not is not None:
        return why_not
    from bitnet_triton.triton_cpu.toolchain import toolchain

    try:
        toolchain()
    except (ToolchainError, CacheError) as error:
        return str(error)
    return None if compat.tested() else _self_test_objection()


def _self_test_objection() -> str | None:
    """Run a small kernel; whatever an unknown version of Triton does wrong is an objection."""
    try:
        from bitnet_triton.triton_cpu.self_test import run

        run()
    except Exception as error:
        return f"Triton {compat.version()} is newer than what was tested, and fails: {error!r}"
    return None


@dataclass(frozen=True)
class Report:
    """What there is on this machine to run Triton kernels on its CPU.

    Attributes:
        objection: why they cannot run; None when they can.
        compiler: the C++ compiler with its version; empty when there is none.
        features: the instruction sets of the CPU that make a difference.
        cache: where compiled kernels are kept; None where there can be none.
        cache_bytes: how large they are.
        real_triton_cpu: whether the project triton-cpu is installed.
    """

    objection: str | None
    compiler: str
    features: list[str]
    cache: Path | None
    cache_bytes: int
    real_triton_cpu: bool


def report() -> Report:
    """Return what ``bitnet-triton doctor`` shows."""
    why_not = objection()
    if why_not is not None:
        return Report(why_not, "", [], None, 0, real_triton_cpu())
    from bitnet_triton.triton_cpu import cache, toolchain

    found = toolchain.toolchain()
    compiler = f"{' '.join(found.command)}: {found.version}"
    features = toolchain.cpu_features()
    return Report(None, compiler, features, cache.location(), cache.size(), real_triton_cpu())


def real_triton_cpu() -> bool:
    """Tell whether the project triton-cpu is installed, which compiles for CPUs by itself."""
    if compat.version() is None:
        return False
    from triton.backends import backends

    return "cpu" in backends
