"""Tile sizes of the Triton kernels, by kind of device, op and shape class.

Each op registers tables of its own (``kernels/<op>/tile_sizes.py``). What ``python -m bench tune``
has measured on this machine comes before them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from bitnet_triton.runtime.measured import measured_tiles
from bitnet_triton.runtime.tiles import (
    ANY,
    CPU,
    FLOAT32,
    FLOAT32_SUFFIX,
    GPU,
    GPU_TABLES,
    Table,
    Tiles,
    kernel_of,
    register_tiles,
)

__all__ = [
    "ANY",
    "CPU",
    "FLOAT32",
    "GPU",
    "GPU_TABLES",
    "Table",
    "Tiles",
    "all_tiles",
    "fitted_tiles",
    "gpu_family",
    "has_tiles",
    "head_size",
    "largest_size",
    "register_tiles",
    "size_classes",
    "tiles",
    "tiles_for",
]

_SMALLEST_FITTED = 16

_forced_gpu: ContextVar[str | None] = ContextVar("bitnet_triton_gpu", default=None)


def tiles(kernel: str, size: int, device: torch.device, dtype: torch.dtype | None = None) -> Tiles:
    """Return block sizes of a kernel; for GPUs ``num_warps`` and ``num_stages`` as well.

    Args:
        kernel: its name without the leading underscore and ``_kernel``.
        size: number of rows of activations, at most ``largest_size``; of kernels whose program
            holds a row the length of a row.
        device: that the kernel runs on; any but a CPU counts as a GPU.
        dtype: of what it multiplies, where float32 has tiles of its own.
    """
    name, classes = _classes(kernel, device, dtype)
    for largest in classes:
        if size <= largest:
            break
    else:
        raise ValueError(f"`size`: {kernel} has tiles up to {largest}, got {size}")
    # every launch comes by here: the tables are read once, and a GPU asks for its index as well
    found = measured_tiles("cpu") if device.type == "cpu" else _measured_on_gpu(device)
    config = classes[largest]
    return config if not found else _usable(found.get((name, largest)), config)


def _classes(
    kernel: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[str, dict[int, Tiles]]:
    table = _table(device)
    if dtype == torch.float32 and kernel + FLOAT32_SUFFIX in table:
        kernel += FLOAT32_SUFFIX
    return kernel, table[kernel]


def _table(device: torch.device) -> dict[str, dict[int, Tiles]]:
    return CPU if device.type == "cpu" else GPU_TABLES[gpu_family(device)]


def gpu_family(device: torch.device) -> str:
    """Return what a GPU is called in the tables of tiles: a key of ``GPU_TABLES``."""
    return _forced_gpu.get() or _gpu_of(device)


@functools.cache
def _gpu_of(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "hip"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuda"
    major, minor = torch.cuda.get_device_capability(device)
    if major > 9:
        return "sm_100"
    return "sm_90" if (major, minor) == (9, 0) else "cuda"


@contextlib.contextmanager
def tiles_for(gpu: str) -> Iterator[None]:
    """Take a GPU for "cuda", "sm_90", "sm_100" or "hip" inside the block, whatever is here.

    They name the tables of tiles: before Hopper, Hopper, after it, and AMD. The ahead-of-time
    compilation records launches under it.
    """
    token = _forced_gpu.set(gpu)
    try:
        yield
    finally:
        _forced_gpu.reset(token)


def has_tiles(kernel: str, device: torch.device) -> bool:
    """Tell whether a kernel is one for such a device: some are for some GPUs only."""
    return kernel in _table(device)


def _measured_on_gpu(device: torch.device) -> dict[tuple[str, int], Tiles]:
    return measured_tiles(str(device)) if device.type == "cuda" else {}


def _usable(measured: Tiles | None, config: Tiles) -> Tiles:
    """Return measured tiles, if there are any and the kernel still has the same ones."""
    return config if measured is None or measured.keys() != config.keys() else measured


def fitted_tiles(
    kernel: str, device: torch.device, *, M: int, N: int, K: int, dtype: torch.dtype | None = None
) -> Tiles:
    """Return block sizes as ``tiles`` does, smaller on a CPU where they would not fill the matrix.

    Blocks for a CPU are large, and what hangs over the edge of a matrix is computed all the same:
    each is halved until at most an eighth of what is computed is wasted, or it is small.
    """
    fitted = dict(tiles(kernel, M, device, dtype))
    if device.type != "cpu":
        return fitted
    for name, size in (("BLOCK_M", M), ("BLOCK_N", N), ("BLOCK_K", K)):
        while fitted[name] > _SMALLEST_FITTED and 8 * (-size % fitted[name]) > size:
            fitted[name] //= 2
    return fitted


def head_size(D: int, dtype: torch.dtype) -> int:
    """Return what kernels over heads ask ``tiles`` for: the size of one, apart for float32."""
    return D + (FLOAT32 if dtype == torch.float32 else 0)


def largest_size(kernel: str) -> int:
    """Return the largest size that a kernel has tiles for."""
    return max(GPU[kernel])


def size_classes(kernel: str, device: torch.device) -> dict[int, Tiles]:
    """Return the tiles of a kernel that stand in the table, by the largest size of their class."""
    return dict(_table(device)[kernel])


def all_tiles() -> dict[str, list[Tiles]]:
    """Return every configuration that is launched on such a GPU untuned, by kernel."""
    found: dict[str, list[Tiles]] = {}
    for kernel, classes in GPU_TABLES[_forced_gpu.get() or "cuda"].items():
        found.setdefault(kernel_of(kernel), []).extend(classes.values())
    return found
