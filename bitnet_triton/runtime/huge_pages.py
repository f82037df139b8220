"""Memory in huge pages of the system: what is read here and there costs fewer walks through tables.

A page of 4 KiB holds sixteen tokens of a head of keys, and a processor knows where some thousands
of pages lie; caches are larger. Linux backs memory with pages of 2 MiB where it is asked to
(``madvise``, as its setting ``transparent_hugepage`` has it by default).
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes
_SMALL = 4 << 10
_ADVICE = 14  # MADV_HUGEPAGE of Linux


def in_huge_pages(memory: Tensor) -> Tensor:
    """Ask for huge pages under a fresh tensor that nobody has written to; return it.

    It is a wish: where the system does not grant it, on other systems and devices, nothing changes.
    """
    if sys.platform != "linux" or torch.compiler.is_compiling() or type(memory) is not Tensor:
        return memory
    if memory.device.type != "cpu" or memory.nbytes < 2 * _HUGE:
        return memory
    start = -(-memory.data_ptr() // _SMALL) * _SMALL
    length = (memory.data_ptr() + memory.nbytes) // _SMALL * _SMALL - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)
    return memory
