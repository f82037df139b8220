"""The public cross entropy of a linear's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_matrix,
    check_tensor,
)
from bitnet_triton.kernels.common.linear import FLOATS, wants_gradient
from bitnet_triton.kernels.linear_cross_entropy.launchers import run_backward, run_forward
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend

# 64 MB in two bytes each: enough tokens that a product reads the weight at the speed of arithmetic
_LOGITS_AT_ONCE = 1 << 25
_FEWEST_TOKENS = 16


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, D = hidden.shape
    return (
        hidden.new_empty((N,), dtype=torch.float32),
        hidden.new_empty((N, 2), dtype=torch.float32),
        hidden.new_empty((N if with_gradient else 0, D)),
    )


def _fake_bwd(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: Tensor,
    ignore_index: int,
    chunk: int,
    with_dhidden: bool,
) -> tuple[Tensor, Tensor]:
    N, D = hidden.shape
    return hidden.new_empty((N if with_dhidden else 0, D)), weight.new_empty(weight.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        chunk: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(hidden, weight, labels, ignore_index, chunk, with_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        hidden, weight, labels, ctx.ignore_index, ctx.chunk, ctx.with_gradient = inputs
        _, stats, dhidden = output
        ctx.mark_non_differentiable(stats, dhidden)
        ctx.set_materialize_grads(False)
        kept = (dhidden,) if ctx.with_gradient else (hidden, weight, labels, stats)
        ctx.save_for_backward(*kept)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor | None, _dstats: Any, _ddhidden: Any) -> tuple:
        if dlosses is None:
            return (None,) * 6
        if ctx.with_gradient:
            (dhidden,) = ctx.saved_tensors
            return ((dhidden * dlosses[:, None]).to(dhidden.dtype), *(None,) * 5)
        needs_dhidden = ctx.needs_input_grad[0]
        with remembered_backend(ctx):
            dhidden, dweight = _bwd(
                dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk, needs_dhidden
            )
        return (dhidden if needs_dhidden else None, dweight, *(None,) * 4)


_bwd = register_op("linear_cross_entropy_bwd", run_backward, _fake_bwd)
_fwd = register_op("linear_cross_entropy_fwd", run_forward, _fake_fwd, function=_LinearCrossEntropy)


def tokens_at_once(V: int) -> int:
    """Return of how many tokens the logits over ``V`` words are there at once."""
    return max(_FEWEST_TOKENS, _LOGITS_AT_ONCE // V)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Return the cross entropy of each token without holding the logits of all of them.

    ``loss = log sum_v exp(h w_v) - h w_label``, 0 where there is no label. The logits of some
    tokens are there at a time, rounded to the dtype of ``hidden``; sums and exponentials are
    float32. Tokens without a label are not multiplied. To find them is to wait for a GPU, once a
    pass.

    A frozen ``weight`` costs two products in all: the gradient of ``hidden`` is made beside the
    losses, and is what is kept for the backward. One that is trained costs four, and its gradient
    is made in the backward, a block of words at a time; kept are ``hidden`` and 8 bytes a token.

    Args:
        hidden: [... D] float16, bfloat16 or float32.
        weight: [V D] in the dtype and on the device of ``hidden``: a row for each word.
        labels: [...] int64, 0 to V - 1, or ``ignore_index``.
        ignore_index: what stands for no label. Default: -100.
        chunk: tokens whose logits are there at once. Default: as many as have 2**25 logits.

    Returns:
        [...] float32; differentiable in ``hidden`` and ``weight``, once.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, a label is no word, or
            ``chunk`` is not positive.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check(hidden, weight, labels)
    V, D = weight.shape
    if chunk is None:
        chunk = tokens_at_once(V)
    elif chunk < 1:
        raise ValueError(f"`chunk`: expected a positive number of tokens, got {chunk}")
    learns = wants_gradient(weight)
    run = _LinearCrossEntropy.apply if wants_gradient(hidden, weight) else _fwd
    with_gradient = not learns and wants_gradient(hidden)
    losses, _, _ = run(
        hidden.reshape(-1, D), weight, labels.reshape(-1), ignore_index, chunk, with_gradient
    )
    return losses.view(labels.shape)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_matrix("weight", weight, "V D")
    check_tensor("hidden", hidden)
    check_dtype("hidden", hidden, weight.dtype)
    D = weight.shape[1]
    if hidden.ndim == 0 or hidden.shape[-1] != D:
        raise ValueError(f"`hidden`: expected [... D] with D={D}, got {list(hidden.shape)}")
    check_device("hidden", hidden, weight.device)
    check_tensor("labels", labels)
    check_dtype("labels", labels, torch.int64)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`labels`: expected {list(hidden.shape[:-1])}, one a token, got {list(labels.shape)}"
        )
    check_device("labels", labels, weight.device)
