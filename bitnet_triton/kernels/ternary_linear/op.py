"""The public ternary linear with packed weights: inference, and gradients of what is before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.common.linear import (
    bias_gradient,
    cast_by_autocast,
    check_bias,
    check_input,
    contiguous,
    wants_gradient,
)
from bitnet_triton.kernels.packing import CODES_PER_BYTE, TernaryWeight
from bitnet_triton.kernels.ternary_linear.launchers import (
    TERNARY_BWD,
    TERNARY_FWD,
)
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select


def _launch_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return _fake_ternary_fwd(x, packed, scale, bias)
    run = select("ternary_linear", TERNARY_FWD, x.device, x, packed)
    return run(x.contiguous(), packed.contiguous(), scale, contiguous(bias))


def _fake_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], CODES_PER_BYTE * packed.shape[0]))


def _launch_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    if dy.shape[0] == 0:
        return _fake_ternary_bwd(dy, packed, scale)
    run = select("ternary_linear_bwd", TERNARY_BWD, dy.device, dy, packed)
    return run(dy.contiguous(), packed.contiguous(), scale)


def _fake_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], packed.shape[1]))


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return _ternary_linear_fwd(x, packed, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, packed, scale, bias = inputs
        ctx.save_for_backward(packed, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        packed, scale = ctx.saved_tensors
        dx = dbias = None
        with remembered_backend(ctx):
            if ctx.needs_input_grad[0]:
                dx = _ternary_linear_bwd(dy, packed, scale)
        if ctx.needs_input_grad[3]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return dx, None, None, dbias


_ternary_linear_bwd = register_op("ternary_linear_bwd", _launch_ternary_bwd, _fake_ternary_bwd)
_ternary_linear_fwd = register_op(
    "ternary_linear_fwd", _launch_ternary_fwd, _fake_ternary_fwd, function=_TernaryLinear
)


def ternary_linear(x: Tensor, weight: TernaryWeight, bias: Tensor | None = None) -> Tensor:
    """Multiply activations, quantised to int8 by token, by packed ternary weights.

    ``y = (sum_k a w) (gamma / 127) scale + bias`` (arXiv:2310.11453, eq. 11; arXiv:2402.17764),
    with the integer sum exact in int32 and the scales applied once, in float32.

    Args:
        x: [..., K] float16, bfloat16 or float32. Under autocast it is cast as for any linear.
        weight: a ternary matrix [N, K] on the device of ``x``.
        bias: [N], or None.

    Returns:
        [..., N] in the dtype of ``x``; differentiable in ``x`` (straight-through) and ``bias``,
        not in ``weight``.

    Raises:
        TypeError: ``weight`` is no TernaryWeight; a tensor has a wrong dtype.
        ValueError: ``x`` is not [..., K], ``bias`` is not [N], or they are on another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    if not isinstance(weight, TernaryWeight):
        raise TypeError(
            f"`weight`: expected a TernaryWeight, got {type(weight).__name__}; "
            "see TernaryWeight.from_codes"
        )
    N, K = weight.shape
    check_input(x, K, weight.device)
    check_bias(bias, N, weight.device)
    x = cast_by_autocast(x)
    args = (x.reshape(-1, K), weight.packed, weight.scale, bias)
    y = (_TernaryLinear.apply if wants_gradient(*args) else _ternary_linear_fwd)(*args)
    return y.view(*x.shape[:-1], N)
