"""What stands between a launch and compiled code: check the grid, pack the arguments, call."""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton

from bitnet_triton.triton_cpu.arguments import Packer
from bitnet_triton.triton_cpu.compiler import TARGET, options_of
from bitnet_triton.triton_cpu.entry import Entry
from bitnet_triton.triton_cpu.graph import recording

_LARGEST = 2**31 - 1


class Launcher:
    """Starts one compiled kernel; Triton makes one for each, as ``driver.launcher_cls``.

    Args:
        src: what was compiled: signature, constants.
        metadata: what the stages of the compiler wrote down.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name: str = metadata.name
        self._src = src
        self._metadata = metadata
        self._packer = Packer(src.signature, metadata.arguments, metadata.disjoint)
        self._disjoint = bool(metadata.disjoint)
        self._cautious: Entry | None = None
        self._lock = threading.Lock()

    def __call__(
        self, nx: int, ny: int, nz: int, stream: Any, entry: Entry, packed_metadata: Any,
        launch_metadata: Any, enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        """Run the kernel, called as Triton calls a launcher."""
        if enter is not None:
            enter(launch_metadata)
        self.start(entry, nx, ny, nz, arguments)
        if leave is not None:
            leave(launch_metadata)

    def start(self, entry: Entry, nx: int, ny: int, nz: int, arguments: Sequence[Any]) -> None:
        """Run the kernel over a grid and wait for it.

        Args:
            entry: of the kernel.
            nx: programs along axis 0.
            ny: programs along axis 1.
            nz: programs along axis 2.
            arguments: of every parameter, constants included.

        Raises:
            ValueError: the grid is negative or too large, or a tensor is not on the CPU.
            TypeError: an argument is not what the kernel was compiled for.
            AssertionError: a ``tl.device_assert`` failed.
        """
        packed = self._packer.pack(arguments)
        if not (0 < nx <= _LARGEST and 0 < ny <= _LARGEST and 0 < nz <= _LARGEST):
            check_grid(self.name, nx, ny, nz)
            return
        if self._disjoint and self._packer.overlap(arguments):
            entry = self._cautious or self._compile_cautious()
        try:
            failed = entry.run(nx, ny, nz, torch.get_num_threads(), packed)
        except ctypes.ArgumentError:  # integers of NumPy, say, or none at all
            nx, ny, nz = map(operator.index, (nx, ny, nz))
            failed = entry.run(nx, ny, nz, torch.get_num_threads(), packed)
        if failed:
            raise AssertionError(entry.failure(self.name))
        graph = recording.get()
        if graph is not None:
            grid = operator.index(nx), operator.index(ny), operator.index(nz)
            graph.add(entry, self.name, grid, packed, arguments)

    def _compile_cautious(self) -> Entry:
        """Compile the kernel for arguments that share memory."""
        with self._lock:
            if self._cautious is None:
                options = {**options_of(self._metadata), "assume_disjoint": False}
                kernel = triton.compile(self._src, target=TARGET, options=options)
                self._cautious = Entry(kernel.asm["so"])
            return self._cautious


def check_grid(name: str, *grid: int) -> None:
    """Refuse a grid that cannot be run.

    Raises:
        ValueError: it is negative or too large.
    """
    if min(grid) < 0 or max(grid) > _LARGEST:
        raise ValueError(f"kernel {name}: expected a grid of 0 to 2**31 - 1 programs, got {grid}")
