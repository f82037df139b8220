"""The backward of the trainable ternary linear on a GPU: operands made once, products by a library.

The kernels of ``backward.py`` make the codes of the weights, or the activations that int8 codes
stand for, again for every tile, and a GPU spends more on that than on the product: for 2048 tokens,
2560 -> 6912, in bfloat16, an H200 took 272 us for dx and 211 us for dweight with the best tiles,
where cuBLAS multiplies operands that lie in memory in 96 and 108. To make them, and to scale dx,
are passes over 16 to 71 MB, which the memory there moves in 4 to 17 us. They are temporaries, freed
when the product has been started: what the forward keeps for the backward are int8 codes and
scales, as on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_scale
from bitnet_triton.kernels.bit_linear.forward import launch_bit_linear_codes


def product_objection(operands: torch.dtype, result: torch.dtype) -> str | None:
    """Say why ``product`` cannot give ``result`` on the GPU at hand; None when it can."""
    if operands == result:
        return None
    if torch.version.hip is not None:
        return "torch.mm has no float32 result of 16-bit operands on ROCm"
    if torch.cuda.tunable.is_enabled():
        return "torch.mm has no float32 result of 16-bit operands while TunableOp is enabled"
    return None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply two matrices of one dtype; ``dtype`` is theirs, or float32.

    Sums are float32, or what ``torch.backends.cuda.matmul`` allows.
    """
    if left.device.type != "cuda":
        # the same but for the order of sums: only CUDA has results in another dtype
        return torch.mm(left.float(), right.float()).to(dtype)
    if dtype == left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def dweight_dtype(dy: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """Name the dtype of the product behind a gradient in the dtype of ``weight``."""
    return dy if dy == weight else torch.float32


def library_bit_linear_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    """Map dy [M, N] and master weight [N, K] to dx [M, K] in the dtype of dy.

    The product is float32 until it has been scaled: float16 could overflow before, and bfloat16
    would be rounded twice.
    """
    # nested, so that the codes are freed before there is a second [M, K]
    dx = product(dy, launch_bit_linear_codes(weight, stats, binary, dy.dtype), torch.float32)
    return launch_bit_linear_bwd_scale(dx, stats, dy.dtype)


def library_bit_linear_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Map dy [M, N], codes a [M, K] and a_scale [M, 1] to dweight [N, K] in ``dtype``."""
    x = launch_bit_linear_bwd_scale(a, a_scale, dy.dtype)
    return product(dy.t(), x, dweight_dtype(dy.dtype, dtype)).to(dtype)
