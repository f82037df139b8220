"""What this machine can do, measured in the same run and with the same threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils import benchmark

from bench.case import Settings

_REPEATS = 7


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


def best_possible_seconds(
    peaks: Peaks, read_bytes: float, flops: float, arithmetic: str
) -> tuple[float, str]:
    """Return the shortest time that the measured limits allow, and which one binds."""
    memory = read_bytes / peaks.read_bytes_per_s
    rate = peaks.flops_per_s.get(arithmetic)
    compute = flops / rate if rate else 0.0
    return max((memory, "memory"), (compute, "compute"))


def measure_peaks(settings: Settings, *, buffer_bytes: int = 2**29, size: int = 2048) -> Peaks:
    """Measure the read bandwidth and the matrix rates.

    Args:
        settings: device and threads.
        buffer_bytes: size of the buffer that is read; far beyond the last-level cache.
        size: rows and columns of the matrices.
    """
    torch.set_num_threads(settings.threads)
    words = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=settings.device)
    matrix = words[: words.numel() // 4096 * 4096].view(-1, 4096)
    vector = torch.ones(4096, device=settings.device)
    reads = {
        "torch.sum of float32": words.sum,
        "torch.amax of float32": words.amax,
        "torch.dot of float32": lambda: torch.dot(words, words),
        "torch.mv of float32": lambda: torch.mv(matrix, vector),
    }
    seconds = {name: _best(read) for name, read in reads.items()}
    read_by = min(seconds, key=seconds.__getitem__)
    rates = {
        arithmetic: rate
        for arithmetic, multiply in _products(size, settings.device).items()
        if (rate := _rate(multiply, 2 * size**3)) is not None
    }
    return Peaks(4 * words.numel() / seconds[read_by], read_by, rates)


def _products(size: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    full = torch.ones((size, size), device=device)
    half, byte = full.to(torch.bfloat16), full.to(torch.int8)
    return {
        "fp32": lambda: torch.mm(full, full.t()),
        "bf16": lambda: torch.mm(half, half.t()),
        "int8": lambda: torch._int_mm(byte, byte.t()),
    }


def _rate(multiply: Callable[[], Any], flops: int) -> float | None:
    try:
        return flops / _best(multiply)
    except RuntimeError:  # this build of PyTorch has no such product
        return None


def _best(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(_REPEATS):
        start = benchmark.timer()
        call()
        seconds.append(benchmark.timer() - start)
    return min(seconds)
