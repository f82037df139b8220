"""The tables of tile sizes, which ops register: what they look like, and for which devices.

On a CPU a tile fills the caches of a core; sizes were measured. On GPUs each compiles without
register spills for every target in the ahead-of-time test (docs/gpu-kernels.md); those for sm_90
were measured on an H200, the others are chosen on paper.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

Tiles = dict[str, int]
# kernel -> the largest size of a shape class -> its tiles. The size is the number of rows of
# activations (few for decoding, many for prefill and training), or what the launcher says
Table = Mapping[str, Mapping[int, Tiles]]

# What a kernel may be called in a table after its name, where it has several sets of tiles: for
# float32, for few byte rows, for keys or rows from a list, for a choice alone, for many rows
FLOAT32_SUFFIX = "_float32"
_SUFFIXES = (FLOAT32_SUFFIX, "_narrow", "_listed", "_choice", "_many")

ANY = sys.maxsize
# Added to the size of float32 heads, whose products run on no matrix units of GPUs
FLOAT32 = 1024

CPU: dict[str, dict[int, Tiles]] = {}
# on every GPU, where nothing else is said
GPU: dict[str, dict[int, Tiles]] = {}
# what a GPU is called -> its tables. Later ones than Hopper (sm_100, sm_120) are called sm_100
GPU_TABLES: dict[str, dict[str, dict[int, Tiles]]] = {
    "cuda": {}, "sm_90": {}, "sm_100": {}, "hip": {}
}  # fmt: skip


def kernel_of(name: str) -> str:
    """Return the kernel that a table has tiles for under ``name``."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def register_tiles(
    *,
    cpu: Table,
    gpu: Table | None = None,
    nvidia: Table | None = None,
    sm_90: Table | None = None,
    hip: Table | None = None,
) -> None:
    """Add the tables of an op; its ``tile_sizes.py`` calls this once.

    Args:
        cpu: for CPUs.
        gpu: for all GPUs, where none of the following says otherwise.
        nvidia: for NVIDIA alone.
        sm_90: for Hopper, in place of what ``gpu`` and ``nvidia`` say of a kernel.
        hip: the same for AMD.

    Raises:
        ValueError: a kernel has tiles already.
    """
    gpu = gpu or {}
    for kernel in {*cpu, *gpu}:
        if kernel in CPU or kernel in GPU:
            raise ValueError(f"`tiles`: {kernel} has some already")
    _add(CPU, cpu)
    _add(GPU, gpu)
    for family, more in (
        ("cuda", [nvidia]), ("sm_90", [nvidia, sm_90]), ("sm_100", [nvidia]), ("hip", [hip])
    ):  # fmt: skip
        for table in (gpu, *more):
            _add(GPU_TABLES[family], table or {})


def _add(tables: dict[str, dict[int, Tiles]], new: Table) -> None:
    tables.update({kernel: dict(sorted(classes.items())) for kernel, classes in new.items()})
