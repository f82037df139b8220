"""What the device can do, measured in the run whose shares refer to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.peaks import Peaks, measure_peaks
from bench.suite.plan import Plan

# far beyond the last-level cache of any GPU
_BUFFER_BYTES = 2**31
_SIZE = 8192


def measure_limits(plan: Plan) -> Peaks:
    """Measure the bandwidth and the matrix rates; on a CPU only roughly, on little memory.

    A GPU multiplies zeros and ones faster than other numbers, so the data is random.
    """
    if plan.small:
        return measure_peaks(plan.settings, buffer_bytes=2**26, size=512)
    words = torch.randn(_BUFFER_BYTES // 4, device=plan.device)
    copy = torch.empty_like(words)
    # bytes that are moved: a copy reads and writes
    reads: dict[str, tuple[Callable[[], Any], int]] = {
        "torch.sum of float32": (words.sum, words.nbytes),
        "torch.amax of float32": (words.amax, words.nbytes),
        "a copy of float32": (lambda: copy.copy_(words), 2 * words.nbytes),
    }
    rates = {name: moved / _seconds(call) for name, (call, moved) in reads.items()}
    fastest = max(rates, key=rates.__getitem__)
    products = _products(plan.device)
    flops = {name: 2 * _SIZE**3 / _seconds(multiply) for name, multiply in products.items()}
    return Peaks(rates[fastest], fastest, flops)


def _products(device: torch.device) -> dict[str, Callable[[], Any]]:
    a, b = (torch.randn(_SIZE, _SIZE, device=device).to(torch.bfloat16) for _ in range(2))
    c, d = (torch.randint(-127, 128, (_SIZE, _SIZE), device=device).to(torch.int8) for _ in "cd")
    products = {"bf16": lambda: torch.mm(a, b.t()), "int8": lambda: torch._int_mm(c, d.t())}
    try:
        products["int8"]()
    except RuntimeError:  # no such product on this device
        del products["int8"]
    return products


def _seconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=50, rep=200, return_mode="median")
