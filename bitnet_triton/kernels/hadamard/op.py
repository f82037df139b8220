"""The public rotation: checks, the choice of a backend, and the gradient, which is a rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_tensor
from bitnet_triton.kernels.hadamard.reference import hadamard_reference, rotated_block
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import Implementation, register_op, select

# Fewer neighbours than this spread no outlier
SMALLEST_BLOCK = 16
_LARGEST = 512  # a program holds whole rows


def _triton_fwd(x: Tensor) -> Tensor:
    from bitnet_triton.kernels.hadamard.forward import launch_hadamard, rotation

    return launch_hadamard(x, rotation(x.shape[-1], x.device), x.dtype)


def _objection(x: Tensor) -> str | None:
    return None if x.shape[-1] <= _LARGEST else f"rows have at most {_LARGEST} values"


HADAMARD_FWD = {
    "triton": Implementation(_triton_fwd, _objection),
    "reference": Implementation(lambda x: hadamard_reference(x.float()).to(x.dtype)),
}


def _launch(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return select("hadamard", HADAMARD_FWD, x.device, x)(x)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _hadamard_fwd(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return hadamard(dy)


_hadamard_fwd = register_op("hadamard_fwd", _launch, _fake, function=_Hadamard)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension by a normalised Hadamard matrix, which undoes itself.

    Blocks of the largest power of two that divides D are rotated, each by Sylvester's matrix
    divided by the root of its size, in float32: products of two rotated vectors stay what they
    were, and a single large value is spread over its block.

    Args:
        x: [..., D], float16, bfloat16 or float32; D is a multiple of 16.

    Returns:
        [..., D] in the dtype of ``x``; differentiable.

    Raises:
        TypeError: ``x`` has another dtype.
        ValueError: D is no multiple of 16.
    """
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    D = x.shape[-1] if x.ndim else 0
    if D == 0 or rotated_block(D) < SMALLEST_BLOCK:
        raise ValueError(f"`x`: expected rows of a multiple of {SMALLEST_BLOCK} values, got {D}")
    rows = x.reshape(-1, D)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    eager = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return (_Hadamard.apply if eager else _hadamard_fwd)(rows).view(x.shape)
