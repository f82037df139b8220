"""What this machine can do, measured in the same run and with the same threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.case import Settings
from bench.turns import seconds

_REPEATS = 7
# Far beyond the last-level cache, and products long enough to reach their rate
_BUFFER_BYTES = {"cpu": 2**29, "cuda": 2**31}
_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Peaks:
    """Measured limits.

    Attributes:
        read_bytes_per_s: the fastest of several plain reads of a large buffer.
        read_by: which read that was.
        flops_per_s: rate of a large matrix product for "int8", "bf16" and "fp32"; an arithmetic
            that PyTorch cannot multiply here is missing.
    """

    read_bytes_per_s: float
    read_by: str
    flops_per_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reads:
    """A plain read of a large buffer, to be repeated.

    Attributes:
        call: reads the buffer once.
        held_bytes: that a call moves.
    """

    call: Callable[[], Any]
    held_bytes: int


def best_possible_seconds(
    peaks: Peaks,
    read_bytes: float,
    flops: float,
    arithmetic: str,
    read_bytes_per_s: float | None = None,
) -> tuple[float, str]:
    """Return the shortest time that the measured limits allow, and which one binds.

    Args:
        peaks: the limits.
        read_bytes: that have to be moved.
        flops: that have to be computed.
        arithmetic: "int8", "bf16" or "fp32".
        read_bytes_per_s: takes the place of what ``peaks`` say.
    """
    memory = read_bytes / (read_bytes_per_s or peaks.read_bytes_per_s)
    rate = peaks.flops_per_s.get(arithmetic)
    compute = flops / rate if rate else 0.0
    return max((memory, "memory"), (compute, "compute"))


def measure_peaks(
    settings: Settings, *, buffer_bytes: int | None = None, size: int | None = None
) -> Peaks:
    """Measure the read bandwidth and the matrix rates.

    Args:
        settings: device and threads.
        buffer_bytes: size of the buffer that is read; None chooses it for the device.
        size: rows and columns of the matrices; None chooses it for the device.
    """
    peaks, _ = measure_limits(settings, buffer_bytes=buffer_bytes, size=size)
    return peaks


def measure_limits(
    settings: Settings, *, buffer_bytes: int | None = None, size: int | None = None
) -> tuple[Peaks, Reads]:
    """Measure as ``measure_peaks`` does; return the fastest read as well."""
    torch.set_num_threads(settings.threads)
    device = settings.device
    reads = _reads(buffer_bytes or _BUFFER_BYTES[device.type], device)
    rates = {name: read.held_bytes / _best(read.call, device) for name, read in reads.items()}
    fastest = max(rates, key=rates.__getitem__)
    size = size or _SIZE[device.type]
    flops = {
        arithmetic: rate
        for arithmetic, multiply in _products(size, device).items()
        if (rate := _rate(multiply, 2 * size**3, device)) is not None
    }
    return Peaks(rates[fastest], fastest, flops), reads[fastest]


def _reads(buffer_bytes: int, device: torch.device) -> dict[str, Reads]:
    words = torch.empty(buffer_bytes // 4, device=device).uniform_()
    if device.type == "cuda":  # a copy reads and writes
        copy = torch.empty_like(words)
        both = Reads(lambda: copy.copy_(words), 2 * words.nbytes)
        return {**_sums(words), "a copy of float32": both}
    matrix = words[: words.numel() // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096, device=device)
    return {
        **_sums(words),
        "torch.dot of float32": Reads(lambda: torch.dot(words, words), words.nbytes),
        "torch.mv of float32": Reads(lambda: torch.mv(matrix, vector), matrix.nbytes),
    }


def _sums(words: Tensor) -> dict[str, Reads]:
    return {
        "torch.sum of float32": Reads(words.sum, words.nbytes),
        "torch.amax of float32": Reads(words.amax, words.nbytes),
    }


def _products(size: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Multiply random numbers: a GPU multiplies zeros and ones faster."""
    full = torch.randn((size, size), device=device)
    half = full.to(torch.bfloat16)
    byte = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    return {
        "fp32": lambda: torch.mm(full, full.t()),
        "bf16": lambda: torch.mm(half, half.t()),
        "int8": lambda: torch._int_mm(byte, byte.t()),
    }


def _rate(multiply: Callable[[], Any], flops: int, device: torch.device) -> float | None:
    try:
        return flops / _best(multiply, device)
    except RuntimeError:  # this build of PyTorch has no such product
        return None


def _best(call: Callable[[], Any], device: torch.device) -> float:
    call()
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(call, warmup=50, rep=200, return_mode="median")
    return min(seconds(call) for _ in range(_REPEATS))
