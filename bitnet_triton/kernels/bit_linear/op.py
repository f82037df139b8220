"""The public trainable ternary linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.bit_linear.launchers import BIT_BWD_DWEIGHT, BIT_BWD_DX, BIT_FWD
from bitnet_triton.kernels.common.checks import check_dtype, check_matrix, check_tensor
from bitnet_triton.kernels.common.linear import (
    FLOATS,
    bias_gradient,
    cast_by_autocast,
    check_bias,
    check_input,
    contiguous,
    wants_gradient,
)
from bitnet_triton.kernels.quantize.op import LEVELS, weight_stats
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select


def _launch_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake_bit_fwd(x, weight, bias, stats, binary)
    run = select("bit_linear", BIT_FWD, x.device, x, weight)
    return run(x.contiguous(), weight.contiguous(), contiguous(bias), stats, binary)


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
        # int8 codes and their scales stand for x: half of the memory of bfloat16. A frozen weight
        # needs none of that, and an input without gradient needs no weight
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        for_dweight = (a, a_scale) if needs_dweight else (None, None)
        ctx.save_for_backward(*for_dweight, *((weight, stats) if needs_dx else (None, None)))
        ctx.weight_dtype = weight.dtype
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
                dweight = _bit_linear_bwd_dweight(dy, a, a_scale, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return dx, dweight, dbias, None, None


_bit_linear_bwd_dx = register_op("bit_linear_bwd_dx", _launch_bit_bwd_dx, _fake_bit_bwd_dx)
_bit_linear_bwd_dweight = register_op(
    "bit_linear_bwd_dweight", _launch_bit_bwd_dweight, _fake_bit_bwd_dweight
)
_bit_linear_fwd = register_op("bit_linear_fwd", _launch_bit_fwd, _fake_bit_fwd, function=_BitLinear)


def bit_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, levels: str = "ternary"
) -> Tensor:
    """Multiply with master weights that are quantised on the way: the layer for training.

    Forward as ``ternary_linear`` with ``weight`` quantised by its mean magnitude (ternary,
    arXiv:2402.17764, eq. 1-3) or to the sign of its distance from its mean (binary,
    arXiv:2310.11453, eq. 1-3). Backward straight through both quantisers: ``dx = dy (beta w)``,
    ``dweight = dy^T (a gamma / 127)``, nothing through the scales. Memory for the backward: the
    int8 codes of ``x`` and their scales. On a GPU each pass also writes a quantised operand to
    memory once (codes of the weight, or ``x`` out of its codes) and frees it at once: making it
    again for every tile of tokens would cost more than the product.

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
    check_input(x, K, weight.device)
    check_bias(bias, N, weight.device)
    if levels not in LEVELS:
        raise ValueError(f"`levels`: expected one of {', '.join(LEVELS)}, got {levels!r}")
    x = cast_by_autocast(x)
    stats = weight_stats(weight.detach())
    args = (x.reshape(-1, K), weight, bias)
    run = _BitLinear.apply if wants_gradient(*args) else _bit_linear_fwd
    y, _, _ = run(*args, stats, levels == "binary")
    return y.view(*x.shape[:-1], N)
