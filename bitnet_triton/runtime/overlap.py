"""Whether a kernel may start while the one before it on the stream still runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from bitnet_triton.runtime.autotune import gpu_family
from bitnet_triton.runtime.device import is_interpreted

_in_order: ContextVar[bool] = ContextVar("bitnet_triton_in_order", default=False)


def can_overlap(device: torch.device) -> bool:
    """Tell whether launches on ``device`` may overlap: those of Hopper and later NVIDIA GPUs can.

    They have programmatic dependent launch (CUDA programming guide), for which a kernel has to be
    written (``kernels/common/dependent.py``).
    """
    if device.type == "cpu" or _in_order.get():
        return False
    new_enough = gpu_family(device) in ("sm_90", "sm_100") and _driver_records_overlap()
    return new_enough and not is_interpreted()


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Let every launch in the block wait until the one before has ended, to compare with."""
    token = _in_order.set(True)
    try:
        yield
    finally:
        _in_order.reset(token)


@functools.cache
def _driver_records_overlap() -> bool:
    """Tell whether such launches may stand in a CUDA graph: since CUDA 12.3."""
    return not torch.cuda.is_available() or vars(torch._C)["_cuda_getDriverVersion"]() >= 12030
