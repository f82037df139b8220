"""The public ternary linears: packed weights for inference, master weights for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_device, check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.packing import TernaryWeight
from bitnet_triton.kernels.quantize.op import FLOATS, LEVELS, weight_stats
from bitnet_triton.kernels.ternary_linear.launchers import (
    BIT_BWD,
    BIT_FWD,
    TERNARY_BWD,
    TERNARY_FWD,
)
from bitnet_triton.runtime import register_op, select


def _launch_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    run = select("ternary_linear", TERNARY_FWD, x.device, x, packed)
    return run(x.contiguous(), packed, scale, bias)


def _fake_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], 4 * packed.shape[0]))


def _launch_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    run = select("ternary_linear_bwd", TERNARY_BWD, dy.device, dy, packed)
    return run(dy.contiguous(), packed, scale)


def _fake_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], packed.shape[1]))


def _launch_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("bit_linear", BIT_FWD, x.device, x, weight)
    return run(x.contiguous(), weight.contiguous(), bias, stats, binary)


def _fake_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    return (
        x.new_empty((M, weight.shape[0])),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((M, 1), dtype=torch.float32),
    )


def _launch_bit_bwd(
    dy: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor]:
    run = select("bit_linear_bwd", BIT_BWD, dy.device, dy, weight)
    return run(dy.contiguous(), a, a_scale, weight.contiguous(), stats, binary)


def _fake_bit_bwd(
    dy: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(a.shape), torch.empty_like(weight)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return _ternary_linear_fwd(x, packed, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, packed, scale, bias = inputs
        ctx.save_for_backward(packed, scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        packed, scale = ctx.saved_tensors
        dx = _ternary_linear_bwd(dy, packed, scale) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, None, None, dbias


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _bit_linear_fwd(x, weight, bias, stats, binary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, weight, bias, stats, binary = inputs
        _, a, a_scale = output
        ctx.mark_non_differentiable(a, a_scale)
        # int8 codes and their scales stand for x: a quarter of the memory of float32
        ctx.save_for_backward(a, a_scale, weight, stats)
        ctx.binary = binary
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _da: Any, _dscale: Any) -> tuple:
        a, a_scale, weight, stats = ctx.saved_tensors
        dx, dweight = _bit_linear_bwd(dy, a, a_scale, weight, stats, ctx.binary)
        dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


_ternary_linear_bwd = register_op("ternary_linear_bwd", _launch_ternary_bwd, _fake_ternary_bwd)
_ternary_linear_fwd = register_op(
    "ternary_linear_fwd", _launch_ternary_fwd, _fake_ternary_fwd, function=_TernaryLinear
)
_bit_linear_bwd = register_op("bit_linear_bwd", _launch_bit_bwd, _fake_bit_bwd)
_bit_linear_fwd = register_op(
    "bit_linear_fwd", _launch_bit_fwd, _fake_bit_fwd, function=_BitLinear
)


def _check_input(x: Tensor, K: int, device: torch.device) -> None:
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"`x`: expected [... K] with K={K}, got {list(x.shape)}")
    check_device("x", x, device)


def _check_bias(bias: Tensor | None, N: int, device: torch.device) -> None:
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, "N", N=N)
        check_device("bias", bias, device)


def _autocast(x: Tensor) -> Tensor:
    """Cast ``x`` as torch.autocast casts the input of any linear."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
    _check_input(x, K, weight.device)
    _check_bias(bias, N, weight.device)
    x = _autocast(x)
    y = _TernaryLinear.apply(x.reshape(-1, K), weight.packed, weight.scale, bias)
    return y.view(*x.shape[:-1], N)


def bit_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, levels: str = "ternary"
) -> Tensor:
    """Multiply with master weights that are quantised on the way: the layer for training.

    Forward as ``ternary_linear`` with ``weight`` quantised by its mean magnitude (ternary,
    arXiv:2402.17764, eq. 1-3) or to the sign of its distance from its mean (binary,
    arXiv:2310.11453, eq. 1-3). Backward straight through both quantisers: ``dx = dy (beta w)``,
    ``dweight = dy^T (a gamma / 127)``, nothing through the scales. Memory for the backward: the
    int8 codes of ``x``.

    Args:
        x: [..., K] float16, bfloat16 or float32. Under autocast it is cast as for any linear.
        weight: [N, K] float16, bfloat16 or float32 masters, on the device of ``x``.
        bias: [N], or None.
        levels: "ternary" for -1, 0, 1; "binary" for -1, 1, where a weight equal to the mean
            gives -1. Default: "ternary".

    Returns:
        [..., N] in the dtype of ``x``; differentiable in ``x``, ``weight`` and ``bias``.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, ``weight`` is on another device, or ``levels`` is unknown.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_shape("weight", weight, "N K")
    N, K = weight.shape
    _check_input(x, K, weight.device)
    _check_bias(bias, N, weight.device)
    if levels not in LEVELS:
        raise ValueError(f"`levels`: expected one of {', '.join(LEVELS)}, got {levels!r}")
    x = _autocast(x)
    stats = _weight_stats(weight.detach())
    y, _, _ = _BitLinear.apply(x.reshape(-1, K), weight, bias, stats, levels == "binary")
    return y.view(*x.shape[:-1], N)


def _fake_stats(weight: Tensor) -> Tensor:
    return weight.new_empty(2, dtype=torch.float32)


def _launch_stats(weight: Tensor) -> Tensor:
    return weight_stats(weight)


_weight_stats = register_op("weight_stats", _launch_stats, _fake_stats)
