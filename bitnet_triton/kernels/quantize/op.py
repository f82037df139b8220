"""Public quantisers, and the statistics of a weight that the trainable linear shares."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.quantize.compiled import (
    compiled_quantize_activations,
    compiled_weight_codes,
    compiled_weight_stats,
)
from bitnet_triton.kernels.quantize.reference import (
    SMALLEST_SCALE,
    quantize_activations_reference,
    quantize_weight_reference,
)
from bitnet_triton.runtime import Implementation, register_op, select

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = ("ternary", "binary")


def _triton_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    # imported on first use: loading Triton takes longer than loading this package
    from bitnet_triton.kernels.quantize.forward import launch_quantize_activations

    return launch_quantize_activations(x)


def _reference_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_activations_reference(x.float())
    return codes.to(torch.int8), scale


_ACTIVATIONS = {
    "triton": Implementation(_triton_activations),
    "compile": Implementation(compiled_quantize_activations),
    "reference": Implementation(_reference_activations),
}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] by rows without checks; for the ops above this one."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return select("quantize_activations", _ACTIVATIONS, x.device)(x)


def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_quantize_activations_fwd = register_op("quantize_activations_fwd", _launch, _fake)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations to int8, one scale a token.

    ``gamma = max(max|x|, 1e-5)``, ``codes = clip(round(127 x / gamma), -128, 127)``,
    ``scale = gamma / 127`` (arXiv:2310.11453, eq. 4, per token), rounded half to even, in float32.
    Not differentiable: ``bit_linear`` holds the straight-through form.

    Args:
        x: [..., K] float16, bfloat16 or float32.

    Returns:
        int8 codes [..., K] and float32 scale [..., 1]; x is about codes * scale.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is a scalar, or K is 0.
    """
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"`x`: expected [... K] with K at least 1, got {list(x.shape)}")
    K = x.shape[-1]
    codes, scale = _quantize_activations_fwd(x.detach().reshape(-1, K))
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _eager_stats(weight: Tensor) -> Tensor:
    total = torch.linalg.vector_norm(weight, ord=1, dtype=torch.float32)
    scale = (total / weight.numel()).clamp_min(SMALLEST_SCALE)
    return torch.stack([scale, weight.mean(dtype=torch.float32)])


def _reference_stats(weight: Tensor) -> Tensor:
    w = weight.float()
    return torch.stack([w.abs().mean().clamp_min(SMALLEST_SCALE), w.mean()])


_STATS = {
    "triton": Implementation(_eager_stats),  # a plain reduction: nothing that a kernel would add
    "compile": Implementation(compiled_weight_stats),
    "reference": Implementation(_reference_stats),
}


def weight_stats(weight: Tensor) -> Tensor:
    """Return float32 [2] of ``weight`` [N, K]: its scale and its mean, over the whole matrix."""
    return select("weight_stats", _STATS, weight.device)(weight)


def weight_codes(weight: Tensor, stats: Tensor, levels: str) -> Tensor:
    """Quantise ``weight`` [N, K] to int8 codes by its ``stats`` [2], as torch.compile fuses it."""
    return compiled_weight_codes(weight, stats, levels == "binary")


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise master weights to ternary codes once, for packing.

    ``scale = max(mean|W|, 1e-5)`` over the whole matrix, ``codes = clip(round(W / scale), -1, 1)``
    (arXiv:2402.17764, eq. 1-3), in float32.

    Args:
        weight: [N, K] float16, bfloat16 or float32 master weights, not dequantised codes.

    Returns:
        int8 codes [N, K] and float32 scale [1].

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` is no matrix or holds NaN or infinity.
    """
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_shape("weight", weight, "N K")
    codes, scale = quantize_weight_reference(weight.detach().float(), levels="ternary")
    if not torch.isfinite(scale):
        raise ValueError("`weight`: expected finite values, got NaN or infinity")
    return codes.to(torch.int8), scale.reshape(1)
