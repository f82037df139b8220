"""Record launches once, run them again without Python in between: what CUDA graphs are on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_triton.triton_cpu.entry import Entry

# They give memory without values: a graph keeps it and its kernels fill it
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


class _Step(ctypes.Structure):
    """One launch, as include/program.h has it."""

    _fields_ = (
        ("run", ctypes.c_void_p),
        ("grid", ctypes.c_int * 3),
        ("arguments", ctypes.c_char_p),
    )


class Graph:
    """A sequence of launches, with the memory that they read and write.

    A replay runs the same kernels over the same grids on the same tensors, whatever these hold by
    then. Tensors that were allocated while it was recorded live as long as the graph.
    """

    def __init__(self) -> None:
        self._launches: list[tuple[Entry, str, tuple[int, int, int], bytes]] = []
        self._kept: list[Sequence[Any]] = []
        self._steps: Any = None

    def __len__(self) -> int:
        """Return the number of launches."""
        return len(self._launches)

    def add(
        self,
        entry: Entry,
        name: str,
        grid: tuple[int, int, int],
        packed: bytes,
        arguments: Sequence[Any],
    ) -> None:
        """Append a launch; ``packed`` holds addresses of what ``arguments`` keep alive."""
        self._launches.append((entry, name, grid, packed))
        self._kept.append(arguments)
        self._steps = None

    def replay(self) -> None:
        """Run all launches again, in their order, and wait for the last one.

        Raises:
            AssertionError: a ``tl.device_assert`` failed; later launches were not run.
        """
        if not self._launches:
            return
        if self._steps is None:
            self._steps = (_Step * len(self))(
                *(_Step(entry.address, grid, packed) for entry, _, grid, packed in self._launches)
            )
        failed = self._launches[0][0].replay(self._steps, len(self), torch.get_num_threads())
        if failed:
            entry, name, _, _ = self._launches[failed - 1]
            raise AssertionError(entry.failure(name))


recording: ContextVar[Graph | None] = ContextVar("triton_cpu_recording", default=None)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing inside the block: launches that are timed, for instance."""
    token = recording.set(None)
    try:
        yield
    finally:
        recording.reset(token)


@contextlib.contextmanager
def capture() -> Iterator[Graph]:
    """Record the launches of the block, which run as they would without.

    Only Triton kernels are recorded. Inside the block PyTorch may allocate and view memory; any
    other operation would be missing from a replay, and is refused.

    Yields:
        The graph, complete at the end of the block.

    Raises:
        RuntimeError: captures are nested, kernels are interpreted, or PyTorch computes something.
    """
    if recording.get() is not None:
        raise RuntimeError("a capture inside of a capture: the launches can go into one graph only")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be recorded")
    graph = Graph()
    token = recording.set(graph)
    try:
        with _NothingComputed():
            yield graph
    finally:
        recording.reset(token)


class _NothingComputed(TorchDispatchMode):
    """Lets PyTorch allocate and view memory, and nothing else."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` if it computes nothing."""
        if not _is_harmless(func):
            raise RuntimeError(
                f"`{func}` runs while launches are recorded: a replay would leave it out, because "
                "only Triton kernels are recorded"
            )
        return func(*args, **(kwargs or {}))


@functools.cache
def _is_harmless(func: Any) -> bool:
    """Tell whether an operation needs no repetition: it allocates, views, or sees no tensor."""
    schema = func._schema
    types = [str(part.type) for part in (*schema.arguments, *schema.returns)]
    if func._opname in _ALLOCATIONS or not any("Tensor" in name for name in types):
        return True
    return bool(schema.returns) and all(
        result.alias_info is not None and not result.alias_info.is_write
        for result in schema.returns
    )
