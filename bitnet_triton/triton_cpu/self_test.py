"""A small kernel that shows whether the backend works with the Triton that is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitnet_triton.triton_cpu.side import prepared


@triton.jit
def _weighted_sum_kernel(x_ptr, weight_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    weight = tl.load(weight_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x * weight) * scale)


def run() -> None:
    """Run the kernel and compare its results.

    Raises:
        RuntimeError: they are wrong.
    """
    x, weight, out = torch.arange(100.0), torch.ones(100), torch.empty(2)
    prepared(_weighted_sum_kernel).run(x, weight, out, 100, 0.5, BLOCK=64, grid=(2,), warmup=False)
    if out.tolist() != [1008.0, 1467.0]:
        raise RuntimeError(f"a weighted sum gives {out.tolist()} in place of [1008.0, 1467.0]")
