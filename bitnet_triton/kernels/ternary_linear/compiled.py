"""The ternary linear on a CPU, by torch.compile around PyTorch's int8 product.

One row reads the packed bytes directly. Many rows unpack a matrix to int8, four codes in each
32-bit operation, and multiply with ``torch._int_mm``. Both use codes + 1, which are unsigned, and
subtract the row sum of the activations: sum a * w = sum a * (w + 1) - sum a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.packing import CODES_PER_BYTE
from bitnet_triton.kernels.quantize.compiled import compiled_quantize_activations
from bitnet_triton.runtime import compile_by_kind

# One row sums |a| * (w + 1) * 4**3 <= 128 * 2 * 64 in int32 before it scales down
MAX_K_ONE_ROW = (2**31 - 1) // (128 * 2 * 4**3)


@compile_by_kind
def _one_row(
    a: Tensor, a_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Map int8 a [1, K] and ``packed`` [N / 4, K] to y [1, N], one plane of rows after another.

    The bits stay where they are in the byte; the finished sum is shifted, not every term. The
    quantiser stays outside: inside, Inductor would run it again for every row.
    """
    wide, a32 = packed.to(torch.int32), a[0].to(torch.int32)
    planes = [
        ((wide & (3 << (2 * j))) * a32).sum(-1, dtype=torch.int32) >> (2 * j)
        for j in range(CODES_PER_BYTE)
    ]
    return _scaled(torch.stack(planes).view(1, -1), a, a_scale, scale, bias, dtype)


@compile_by_kind
def _unpack_planes(words: Tensor, mask: int) -> Tensor:
    """Split each word of ``words`` into four words of codes + 1."""
    return torch.stack([(words >> (2 * j)) & mask for j in range(CODES_PER_BYTE)])


def _scaled(
    sums: Tensor, a: Tensor, a_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Turn sums of a * (code + 1) [M, N] into the output [M, N]."""
    exact = sums - a.sum(-1, keepdim=True, dtype=torch.int32)
    y = exact.float() * (a_scale * scale)
    return (y if bias is None else y + bias).to(dtype)


_scale_sums = compile_by_kind(_scaled)


def unpack_unsigned(packed: Tensor) -> Tensor:
    """Unpack uint8 [N / 4, K] into int8 codes + 1 [N, K]."""
    rows, K = packed.shape
    flat = packed.reshape(-1)
    aligned = flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0
    words, mask = (flat.view(torch.int32), 0x03030303) if aligned else (flat, 3)
    return _unpack_planes(words, mask).view(torch.int8).view(CODES_PER_BYTE * rows, K)


def reads_packed(x: Tensor) -> bool:
    """Tell whether the product with x [M, K] reads packed bytes, instead of unpacking them."""
    return x.shape[0] == 1 and x.shape[1] <= MAX_K_ONE_ROW


def compiled_ternary_linear_fwd(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Map x [M, K] and packed [N / 4, K] to y [M, N] in the dtype of x."""
    a, a_scale = compiled_quantize_activations(x)
    if reads_packed(x):
        return _one_row(a, a_scale, packed, scale, bias, x.dtype)
    sums = torch._int_mm(a, unpack_unsigned(packed).t())
    return _scale_sums(sums, a, a_scale, scale, bias, x.dtype)


@compile_by_kind
def _scale_to(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in float32, whatever the dtype of ``value``, and round once to ``dtype``."""
    return (value.float() * scale).to(dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the matrix products of the backward: float16 overflows before scaling."""
    return torch.float32 if dtype == torch.float16 else dtype


def compiled_ternary_linear_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Map dy [M, N] to dx [M, K] in its dtype."""
    dtype = _product_dtype(dy.dtype)
    codes = (unpack_unsigned(packed) - 1).to(dtype)
    return _scale_to(torch.mm(dy.to(dtype), codes), scale, dy.dtype)
