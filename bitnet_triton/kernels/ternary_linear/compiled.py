"""The ternary linear on a CPU, by torch.compile around PyTorch's int8 product.

One row reads the packed bytes directly. Many rows unpack a matrix to int8, four codes in each
32-bit operation, and multiply with ``torch._int_mm``. Both use codes + 1, which are unsigned, and
subtract the row sum of the activations: sum a * w = sum a * (w + 1) - sum a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.packing import CODES_PER_BYTE
from bitnet_triton.kernels.quantize.compiled import (
    compiled_quantize_activations,
    compiled_weight_codes,
)

# One row sums |a| * (w + 1) * 4**3 <= 128 * 2 * 64 in int32 before it scales down
MAX_K_ONE_ROW = (2**31 - 1) // (128 * 2 * 4**3)


@torch.compile(dynamic=True, fullgraph=True)
def _one_row_sums(a: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
    """Sum a [K] int32 * (code + 1) over each row of ``packed`` [N / 4, K], one plane of rows each.

    The bits stay where they are in the byte; the finished sum is shifted, not every term.
    """
    wide = packed.to(torch.int32)
    return tuple(
        ((wide & (3 << (2 * j))) * a).sum(-1, dtype=torch.int32) >> (2 * j)
        for j in range(CODES_PER_BYTE)
    )


@torch.compile(dynamic=True, fullgraph=True)
def _unpack_planes(words: Tensor, mask: int) -> Tensor:
    """Split each word of ``words`` into four words of codes + 1."""
    return torch.stack([(words >> (2 * j)) & mask for j in range(CODES_PER_BYTE)])


@torch.compile(dynamic=True, fullgraph=True)
def _scale_sums(
    sums: Tensor, a: Tensor, a_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Turn sums of a * (code + 1) [M, N] into the output [M, N]."""
    exact = sums - a.sum(-1, keepdim=True, dtype=torch.int32)
    y = exact.float() * (a_scale * scale)
    return (y if bias is None else y + bias).to(dtype)


@torch.compile(dynamic=True, fullgraph=True)
def _scale_products(
    acc: Tensor, a_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = acc.float() * (a_scale * scale)
    return (y if bias is None else y + bias).to(dtype)


def unpack_unsigned(packed: Tensor) -> Tensor:
    """Unpack uint8 [N / 4, K] into int8 codes + 1 [N, K]."""
    rows, K = packed.shape
    flat = packed.reshape(-1)
    aligned = flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0
    words, mask = (flat.view(torch.int32), 0x03030303) if aligned else (flat, 3)
    return _unpack_planes(words, mask).view(torch.int8).view(CODES_PER_BYTE * rows, K)


def compiled_ternary_linear_fwd(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Map x [M, K] and packed [N / 4, K] to y [M, N] in the dtype of x."""
    a, a_scale = compiled_quantize_activations(x)
    if x.shape[0] == 1 and x.shape[1] <= MAX_K_ONE_ROW:
        sums = torch.cat(_one_row_sums(a[0].to(torch.int32), packed)).unsqueeze(0)
    else:
        sums = torch._int_mm(a, unpack_unsigned(packed).t())
    return _scale_sums(sums, a, a_scale, scale, bias, x.dtype)


def compiled_ternary_linear_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Map dy [M, N] to dx [M, K] in its dtype."""
    codes = (unpack_unsigned(packed) - 1).to(dy.dtype)
    return torch.mm(dy, codes).mul_(scale.to(dy.dtype))


def compiled_bit_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x [M, K] and master weight [N, K] to y [M, N], int8 codes [M, K] and their scale."""
    a, a_scale = compiled_quantize_activations(x)
    acc = torch._int_mm(a, compiled_weight_codes(weight, stats, binary).t())
    return _scale_products(acc, a_scale, stats[0], bias, x.dtype), a, a_scale


@torch.compile(dynamic=True, fullgraph=True)
def _scaled_to(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (value.float() * scale).to(dtype)


def compiled_bit_linear_bwd(
    dy: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor]:
    """Map dy [M, N] to dx [M, K] in its dtype and dweight [N, K] in the dtype of ``weight``."""
    codes = compiled_weight_codes(weight, stats, binary)
    dx = _scaled_to(torch.mm(dy, codes.to(dy.dtype)), stats[0], dy.dtype)
    dweight = torch.mm(_scaled_to(dy, a_scale, dy.dtype).t(), a.to(dy.dtype))
    return dx, dweight.to(weight.dtype)
