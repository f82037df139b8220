"""RMSNorm (arXiv:1910.07467, eq. 4) in plain PyTorch, and what ternary models do around it.

Rounding follows transformers' BitNet: the caller of a 16-bit model gives the 16-bit ``dtype`` that
activations are rounded to between the steps; None rounds nowhere, which is the oracle of the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.quantize.reference import quantize_activations_reference


def _rounded(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None else value.to(dtype).to(value.dtype)


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Divide ``x`` [..., D] by its root mean square and scale it by ``weight`` [D]."""
    mean_square = x.square().mean(-1, keepdim=True)
    normalised = _rounded(x * (mean_square + eps).rsqrt(), dtype)
    return _rounded(normalised * weight, dtype)


def rms_norm_quantize_reference(
    x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x`` [M, D]; return codes [M, D], their scale [M, 1] and their sums [M]."""
    codes, scale = quantize_activations_reference(
        rms_norm_reference(x, weight, eps=eps, dtype=dtype)
    )
    return codes, scale, codes.sum(-1)


def relu2_mul_norm_quantize_reference(
    gate_up: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Map ``gate_up`` [M, 2 F] to relu(gate)^2 * up, normalise and quantise as above."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = _rounded(_rounded(gate.relu().square(), dtype) * up, dtype)
    return rms_norm_quantize_reference(product, weight, eps=eps, dtype=dtype)


def silu_mul_quantize_reference(
    gate_up: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Map ``gate_up`` [M, 2 F] to silu(gate) * up and quantise it (arXiv:2002.05202, eq. 6)."""
    gate, up = gate_up.chunk(2, dim=-1)
    # as a layer has it: PyTorch's exponential of strided rows differs in the last bit at their ends
    gate = gate.contiguous()
    product = _rounded(_rounded(F.silu(gate), dtype) * up, dtype)
    codes, scale = quantize_activations_reference(product)
    return codes, scale, codes.sum(-1)
