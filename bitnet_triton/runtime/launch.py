"""Start a Triton kernel, or only write down that it would start."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitnet_triton import triton_cpu
from bitnet_triton.runtime.select import TRITON_CPU, forced_backend


class Graph(Protocol):
    """Launches that were recorded, with the memory that they read and write."""

    def replay(self) -> None:
        """Run them again, in their order."""


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: what ``kernel[grid](*args, **options)`` would have run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("bitnet_triton_recorded", default=None)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks ``size`` takes; ``triton.cdiv`` serves kernels, and takes 2 us."""
    return -(-size // block)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return a callable that starts ``kernel`` over ``grid``; launchers use it for every kernel.

    The device of the first argument, a tensor, decides where: on a CPU ``triton_cpu`` compiles and
    runs the kernel, beside whatever driver Triton has, unless the user forced the separate project
    triton-cpu, whose driver is then Triton's own.
    """
    recorded = _recorded.get()
    if recorded is None:
        return functools.partial(_start, kernel, grid)

    def record(*args: Any, **options: Any) -> None:
        recorded.append(Launch(kernel, grid, args, options))

    return record


def _start(kernel: Any, grid: tuple[int, ...], first: Any, *args: Any, **options: Any) -> None:
    ours = first.is_cpu and not (_may_be_forced() and forced_backend() == TRITON_CPU)
    start = triton_cpu.launch(kernel, grid) if ours else kernel[grid]
    start(first, *args, **options)


def capture(device: torch.device) -> AbstractContextManager[Graph]:
    """Record the launches of a with block on tensors of ``device`` as a graph.

    On a GPU nothing runs meanwhile, and every kernel has to be loaded already.
    """
    return triton_cpu.capture() if device.type == "cpu" else _capture_on_gpu()


@contextlib.contextmanager
def _capture_on_gpu() -> Iterator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    # other threads may go on using the GPU
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        yield graph


# Looked up once: a launch takes microseconds
_may_be_forced = functools.cache(triton_cpu.real_triton_cpu)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches inside the block and start none; outputs stay uninitialised.

    Launchers can then be called with tensors on the meta device, which tells the ahead-of-time
    compilation (``runtime/aot.py``) every signature, tile size and specialisation in use.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
