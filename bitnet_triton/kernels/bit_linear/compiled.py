"""The trainable ternary linear by torch.compile around PyTorch's own products.

The forward multiplies int8 codes by ``torch._int_mm``, the backward in the dtype of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantize.compiled import (
    compiled_quantize_activations,
    compiled_weight_codes,
)
from bitnet_triton.runtime import compile_by_kind


@compile_by_kind
def _scale_products(
    acc: Tensor, a_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = acc.float() * (a_scale * scale)
    return (y if bias is None else y + bias).to(dtype)


@compile_by_kind
def _scale_to(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in float32, whatever the dtype of ``value``, and round once to ``dtype``."""
    return (value.float() * scale).to(dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the matrix products of the backward: float16 overflows before scaling."""
    return torch.float32 if dtype == torch.float16 else dtype


def compiled_bit_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x [M, K] and master weight [N, K] to y [M, N], int8 codes [M, K] and their scale."""
    a, a_scale = compiled_quantize_activations(x)
    acc = torch._int_mm(a, compiled_weight_codes(weight, stats, binary).t())
    return _scale_products(acc, a_scale, stats[:1], bias, x.dtype), a, a_scale


def compiled_bit_linear_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    """Map dy [M, N] and master weight [N, K] to dx [M, K] in the dtype of dy."""
    dtype = _product_dtype(dy.dtype)
    codes = compiled_weight_codes(weight, stats, binary).to(dtype)
    return _scale_to(torch.mm(dy.to(dtype), codes), stats[:1], dy.dtype)


def compiled_bit_linear_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Map dy [M, N], codes a [M, K] and their scale to dweight [N, K] in ``dtype``."""
    product_dtype = _product_dtype(dy.dtype)
    x = _scale_to(a, a_scale, product_dtype)
    return torch.mm(dy.to(product_dtype).t(), x).to(dtype)
