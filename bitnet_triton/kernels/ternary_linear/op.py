"""The public ternary linears: packed weights for inference, master weights for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_matrix,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.packing import CODES_PER_BYTE, TernaryWeight
from bitnet_triton.kernels.quantize.op import FLOATS, LEVELS, weight_stats
from bitnet_triton.kernels.ternary_linear.launchers import (
    BIT_BWD_DWEIGHT,
    BIT_BWD_DX,
    BIT_FWD,
    TERNARY_BWD,
    TERNARY_FWD,
)
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select
from bitnet_triton.runtime.device import autocast_dtype


def _launch_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return _fake_ternary_fwd(x, packed, scale, bias)
    run = select("ternary_linear", TERNARY_FWD, x.device, x, packed)
    return run(x.contiguous(), packed.contiguous(), scale, _contiguous(bias))


def _fake_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], CODES_PER_BYTE * packed.shape[0]))


def _launch_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    if dy.shape[0] == 0:
        return _fake_ternary_bwd(dy, packed, scale)
    run = select("ternary_linear_bwd", TERNARY_BWD, dy.device, dy, packed)
    return run(dy.contiguous(), packed.contiguous(), scale)


def _fake_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], packed.shape[1]))


def _launch_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake_bit_fwd(x, weight, bias, stats, binary)
    run = select("bit_linear", BIT_FWD, x.device, x, weight)
    return run(x.contiguous(), weight.contiguous(), _contiguous(bias), stats, binary)


def _fake_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    return (
        x.new_empty((M, weight.shape[0])),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((M, 1), dtype=torch.float32),
    )


def _launch_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    if dy.shape[0] == 0:
        return _fake_bit_bwd_dx(dy, weight, stats, binary)
    run = select("bit_linear_bwd_dx", BIT_BWD_DX, dy.device, dy, weight)
    return run(dy.contiguous(), weight.contiguous(), stats, binary)


def _fake_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _launch_bit_bwd_dweight(dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dy.shape[0] == 0:
        return _fake_bit_bwd_dweight(dy, a, a_scale, dtype).zero_()
    run = select("bit_linear_bwd_dweight", BIT_BWD_DWEIGHT, dy.device, dy, a)
    return run(dy.contiguous(), a, a_scale, dtype)


def _fake_bit_bwd_dweight(dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[1], a.shape[1]), dtype=dtype)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


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
            dbias = _bias_gradient(dy, ctx.bias_dtype)
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
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _da: Any, _dscale: Any) -> tuple:
        a, a_scale, weight, stats = ctx.saved_tensors
        dx = dweight = dbias = None
        with remembered_backend(ctx):
            if ctx.needs_input_grad[0]:
                dx = _bit_linear_bwd_dx(dy, weight, stats, ctx.binary)
            if ctx.needs_input_grad[1]:
                dweight = _bit_linear_bwd_dweight(dy, a, a_scale, weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = _bias_gradient(dy, ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def _bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.sum(0, dtype=torch.float32).to(dtype)


_ternary_linear_bwd = register_op("ternary_linear_bwd", _launch_ternary_bwd, _fake_ternary_bwd)
_ternary_linear_fwd = register_op(
    "ternary_linear_fwd", _launch_ternary_fwd, _fake_ternary_fwd, function=_TernaryLinear
)
_bit_linear_bwd_dx = register_op("bit_linear_bwd_dx", _launch_bit_bwd_dx, _fake_bit_bwd_dx)
_bit_linear_bwd_dweight = register_op(
    "bit_linear_bwd_dweight", _launch_bit_bwd_dweight, _fake_bit_bwd_dweight
)
_bit_linear_fwd = register_op("bit_linear_fwd", _launch_bit_fwd, _fake_bit_fwd, function=_BitLinear)


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
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None else x.to(dtype)


def _wants_gradient(*args: Tensor | None) -> bool:
    """Tell whether autograd has to see a call; leaving it out saves some 30 microseconds."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)


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
    args = (x.reshape(-1, K), weight.packed, weight.scale, bias)
    y = (_TernaryLinear.apply if _wants_gradient(*args) else _ternary_linear_fwd)(*args)
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
        ValueError: shapes do not fit, ``weight`` is empty or on another device, or ``levels`` is
            unknown.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_matrix("weight", weight)
    N, K = weight.shape
    _check_input(x, K, weight.device)
    _check_bias(bias, N, weight.device)
    if levels not in LEVELS:
        raise ValueError(f"`levels`: expected one of {', '.join(LEVELS)}, got {levels!r}")
    x = _autocast(x)
    stats = weight_stats(weight.detach())
    args = (x.reshape(-1, K), weight, bias)
    run = _BitLinear.apply if _wants_gradient(*args) else _bit_linear_fwd
    y, _, _ = run(*args, stats, levels == "binary")
    return y.view(*x.shape[:-1], N)
