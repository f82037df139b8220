"""The driver half of the backend: what Triton asks of a device."""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from bitnet_triton.triton_cpu import compat
from bitnet_triton.triton_cpu.compiler import BACKEND, LARGEST_MEMORY, TARGET
from bitnet_triton.triton_cpu.entry import Entry
from bitnet_triton.triton_cpu.graph import paused
from bitnet_triton.triton_cpu.launcher import Launcher

# Triton keeps what it compiled by device: a number that no GPU has
DEVICE = -1
_SECONDS = 0.05
_FEWEST, _MOST = 3, 50
# Vector registers of a core with AVX-512 or NEON; a program has them to itself
_REGISTERS = 32


def benchmark(
    call: Callable[[], Any], *, quantiles: Sequence[float] | None = None, **_: Any
) -> Any:
    """Time ``call`` on the CPU, in milliseconds, with the interface of ``do_bench``.

    Args:
        call: runs the kernel once.
        quantiles: which to return; None for the median alone.
    """
    times: list[float] = []
    with paused():
        call()
        while len(times) < _FEWEST or (sum(times) < _SECONDS * 1e3 and len(times) < _MOST):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    if quantiles is None:
        return statistics.median(times)
    times.sort()
    return [times[round(q * (len(times) - 1))] for q in quantiles]


def _benchmark_on_active_driver(call: Callable[[], Any], **options: Any) -> Any:
    """Time ``call`` as the active driver would: tuners keep the function that they were given."""
    active = compat.active_driver()
    if active is None or isinstance(active, CPUDriver):
        return benchmark(call, **options)
    return active.get_benchmarker()(call, **options)


class Event:
    """A point in time, like ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once: kernels have ended when their launch returns."""

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end._time - self._time) * 1e3


class DeviceInterface:
    """The part of ``torch.cuda`` that ``triton.testing`` uses."""

    Event = Event

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Return at once: kernels have ended when their launch returns."""

    @staticmethod
    def current_device() -> int:
        """Return the number of the CPU."""
        return DEVICE


class Utilities:
    """Loads binaries, and knows the limits of the device."""

    # Memory fits any block; what it costs is time, when it leaves the cache of a core. Registers
    # are those of 64 warps, the most that one processor of a GPU has: host code that divides by
    # what a kernel takes gets a few programs a core, which even out, and never none
    PROPERTIES: ClassVar = {
        "max_shared_mem": LARGEST_MEMORY, "max_num_regs": 64 * _REGISTERS, "warpSize": 1,
    }  # fmt: skip

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limits that Triton checks kernels against, and host code computes with."""
        return {**self.PROPERTIES, "multiprocessor_count": len(os.sched_getaffinity(0))}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[Any, Entry, int, int, int]:
        """Load a kernel; return module, function, registers, spills and most threads."""
        entry = Entry(binary)
        return entry, entry, _REGISTERS, 0, 1 << 20

    def unload_module(self, module: Any) -> None:
        """Keep the library: other kernels may come from the same file."""


class _Launcher(Launcher):
    """Remembers for whom Triton has made launchers."""

    functions: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        if (fn := getattr(src, "fn", None)) is not None:
            self.functions.add(fn)


class CPUDriver(DriverBase):
    """Runs kernels on tensors in main memory."""

    launcher_cls = _Launcher

    def __init__(self) -> None:
        super().__init__()
        self.utils = Utilities()

    @staticmethod
    def is_active() -> bool:
        """Tell whether Triton may choose this driver by itself: only where it was named.

        Triton refuses to choose between two that are active, and other libraries take an active
        driver for a GPU.
        """
        return os.environ.get("TRITON_DEFAULT_BACKEND") == BACKEND

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return TARGET

    def get_current_device(self) -> int:
        """Return the number under which Triton keeps kernels for the CPU."""
        return DEVICE

    def set_current_device(self, device: int) -> None:
        """Do nothing: there is one CPU."""

    def get_current_stream(self, device: int) -> int:
        """Return the only stream: launches run one after another."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return torch's name of the device."""
        return torch.device("cpu")

    def get_device_interface(self) -> type[DeviceInterface]:
        """Return what stands for ``torch.cuda``."""
        return DeviceInterface

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the C++ type of an argument."""
        return "void*" if ty.startswith("*") else ty

    def get_benchmarker(self) -> Callable[..., Any]:
        """Return what ``triton.autotune`` times configurations with."""
        return _benchmark_on_active_driver

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """Return a buffer that is larger than the caches of most CPUs."""
        return torch.empty(1 << 25, dtype=torch.uint8)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """Push everything else out of the caches."""
        cache.zero_()


def forget_kernels() -> None:
    """Drop the kernels that Triton compiled for this driver.

    Triton unloads a kernel with the driver that is active when the kernel is freed, and another
    driver would not know what to do with ours.
    """
    for fn in list(_Launcher.functions):
        fn.device_caches.pop(DEVICE, None)
    _Launcher.functions.clear()
