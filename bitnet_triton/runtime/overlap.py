"""Whether a kernel may start while the one before it on the stream still runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from bitnet_triton.runtime.autotune import gpu_family
from bitnet_triton.runtime.device import is_interpreted

# the first release of CUDA whose graphs know such launches
_RECORDS_OVERLAP = 12030

_in_order: ContextVar[bool] = ContextVar("bitnet_triton_in_order", default=False)


def can_overlap(device: torch.device) -> bool:
    """Tell whether launches on ``device`` may overlap: those of Hopper and later NVIDIA GPUs can.

    They have programmatic dependent launch (CUDA programming guide), for which a kernel has to be
    written (``kernels/common/dependent.py``).
    """
    return device.type != "cpu" and not _in_order.get() and _can(device, gpu_family(device))


@functools.cache
def _can(device: torch.device, family: str) -> bool:
    if family not in ("sm_90", "sm_100") or is_interpreted():
        return False
    # what is compiled ahead of time, with tensors on the meta device, does not run here
    return device.type != "cuda" or _driver_version() >= _RECORDS_OVERLAP


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Let every launch in the block wait until the one before has ended, to compare with."""
    token = _in_order.set(True)
    try:
        yield
    finally:
        _in_order.reset(token)


def _driver_version() -> int:
    """Return the version of CUDA that the driver is made for, 12030 for 12.3; 0: there is none."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0
