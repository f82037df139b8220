"""Public quantisers, and the statistics of a weight that the trainable linear shares."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_matrix, check_tensor
from bitnet_triton.kernels.common.linear import FLOATS
from bitnet_triton.kernels.quantize.compiled import (
    compiled_quantize_activations,
    compiled_weight_stats,
)
from bitnet_triton.kernels.quantize.reference import (
    quantize_activations_reference,
    weight_codes_reference,
    weight_stats_reference,
)
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.autotune import largest_size

LEVELS = ("ternary", "binary")


def _triton_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    # imported on first use: loading Triton takes longer than loading this package
    from bitnet_triton.kernels.quantize.forward import launch_quantize_activations

    return launch_quantize_activations(x)


def _triton_activations_objection(x: Tensor) -> str | None:
    largest = largest_size("quantize_activations_fwd")
    return None if x.shape[-1] <= largest else f"a program holds a row of at most {largest} values"


def _reference_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_activations_reference(x.float())
    return codes.to(torch.int8), scale


ACTIVATIONS_FWD = {
    "triton": Implementation(_triton_activations, _triton_activations_objection),
    "compile": Implementation(compiled_quantize_activations),
    "reference": Implementation(_reference_activations),
}


def _triton_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_triton.kernels.quantize.forward import launch_quantize_with_sums

    return launch_quantize_with_sums(x)


def _reference_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = _reference_activations(x)
    return codes, scale, codes.sum(-1, dtype=torch.int32)


ACTIVATIONS_SUMS_FWD = {
    "triton": Implementation(_triton_sums, _triton_activations_objection),
    "reference": Implementation(_reference_sums),
}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] by rows without checks; for the ops above this one."""
    if x.shape[0] == 0:
        return _fake(x)
    return select("quantize_activations", ACTIVATIONS_FWD, x.device, x)(x.contiguous())


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_quantize_activations_fwd = register_op("quantize_activations_fwd", quantize_rows, _fake)


def _launch_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake_sums(x)
    return select("quantize_activations_sums", ACTIVATIONS_SUMS_FWD, x.device, x)(x)


def _fake_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(x), x.new_empty(x.shape[:1], dtype=torch.int32)


# what layers call that multiply packed weights next: contiguous rows, and the sums of their codes
quantize_rows_with_sums = register_op("quantize_activations_sums_fwd", _launch_sums, _fake_sums)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations to int8, one scale a token.

    ``gamma = max(max|x|, 1e-5)``, ``codes = clip(round(127 x / gamma), -128, 127)``,
    ``scale = gamma / 127`` (arXiv:2310.11453, eq. 4, per token), rounded half to even, in float32.
    A token with NaN or infinity has a scale that is not finite. Not differentiable:
    ``bit_linear`` holds the straight-through form.

    Args:
        x: [..., K] float16, bfloat16 or float32.

    Returns:
        int8 codes [..., K] and float32 scale [..., 1]; x is about codes * scale.

    Raises:
        TypeError: ``x`` is not a tensor of one of these dtypes.
        ValueError: ``x`` is a scalar, or K is 0.
    """
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"`x`: expected [... K] with K at least 1, got {list(x.shape)}")
    codes, scale = _quantize_activations_fwd(x.detach().reshape(-1, x.shape[-1]))
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _triton_stats(weight: Tensor) -> Tensor:
    from bitnet_triton.kernels.quantize.forward import launch_weight_stats

    return launch_weight_stats(weight)


def _reference_stats(weight: Tensor) -> Tensor:
    return weight_stats_reference(weight.float())


WEIGHT_STATS = {
    "triton": Implementation(_triton_stats),
    "compile": Implementation(compiled_weight_stats),
    "reference": Implementation(_reference_stats),
}


def _launch_stats(weight: Tensor) -> Tensor:
    return select("weight_stats", WEIGHT_STATS, weight.device)(weight.contiguous())


def _fake_stats(weight: Tensor) -> Tensor:
    return weight.new_empty(2, dtype=torch.float32)


# float32 [2] of a weight [N, K]: its scale and its mean, over the whole matrix
weight_stats = register_op("weight_stats", _launch_stats, _fake_stats)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise master weights to ternary codes once, for packing.

    ``scale = max(mean|W|, 1e-5)`` over the whole matrix, ``codes = clip(round(W / scale), -1, 1)``
    (arXiv:2402.17764, eq. 1-3), in float32: the codes that ``bit_linear`` multiplies with.

    Args:
        weight: [N, K] float16, bfloat16 or float32 master weights, not dequantised codes.

    Returns:
        int8 codes [N, K] and float32 scale [1].

    Raises:
        TypeError: ``weight`` is not a tensor of one of these dtypes.
        ValueError: ``weight`` is no matrix, is empty, or holds NaN or infinity.
    """
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_matrix("weight", weight)
    stats = weight_stats(weight.detach())
    if not torch.isfinite(stats[0]):
        raise ValueError("`weight`: expected finite values, got NaN or infinity")
    codes = weight_codes_reference(weight.detach().float(), stats, levels="ternary")
    return codes.to(torch.int8), stats[:1].clone()
