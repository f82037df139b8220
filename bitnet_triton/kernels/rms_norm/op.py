"""The public norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.linear import FLOATS, wants_gradient
from bitnet_triton.kernels.rms_norm.reference import rms_norm_reference
from bitnet_triton.runtime import (
    Implementation,
    compile_by_kind,
    register_op,
    remember_backend,
    remembered_backend,
    select,
)
from bitnet_triton.runtime.autotune import largest_size


def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.rms_norm.forward import launch_rms_norm

    return launch_rms_norm(x, weight, eps)


def _triton_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.rms_norm.backward import launch_rms_norm_bwd

    return launch_rms_norm_bwd(dy, x, weight, eps, with_dweight)


def _reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    one = torch.ones((), device=x.device)
    normalised = rms_norm_reference(x.float(), one, eps=eps, dtype=x.dtype)
    return (normalised * weight.float()).to(torch.promote_types(x.dtype, weight.dtype))


def _reference_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    wide, gradient = x.float(), dy.float()
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised, scaled = wide * rstd, gradient * weight.float()
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    rows = x.shape[0] if with_dweight else 0
    # float64: Inductor adds up thousands of rows one after the other
    dweight = (gradient * normalised.to(x.dtype).float())[:rows].sum(0, dtype=torch.float64)
    return dx.to(x.dtype), dweight.to(weight.dtype)


_LARGEST = largest_size("rms_norm_fwd")


def program_objection(weight: Tensor) -> str | None:
    """Say why a program cannot hold a row of as many values as ``weight``; None when it can."""
    fits = weight.shape[0] <= _LARGEST
    return None if fits else f"a program holds a row of at most {_LARGEST} values"


NORM_FWD = {
    "triton": Implementation(_triton_norm, program_objection),
    "compile": Implementation(compile_by_kind(_reference_norm)),
    "reference": Implementation(_reference_norm),
}
NORM_BWD = {
    "triton": Implementation(_triton_norm_bwd, program_objection),
    "compile": Implementation(compile_by_kind(_reference_norm_bwd)),
    "reference": Implementation(_reference_norm_bwd),
}


def _launch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[0] == 0:
        return _fake_norm(x, weight, eps)
    return select("rms_norm", NORM_FWD, x.device, weight)(x, weight, eps)


def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


def _launch_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    run = select("rms_norm_bwd", NORM_BWD, x.device, weight)
    return run(dy, x, weight, eps, with_dweight)


def _fake_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_rows(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        _, needs_dweight, _ = ctx.needs_input_grad
        with remembered_backend(ctx):
            dx, dweight = _rms_norm_bwd(dy, x, weight, ctx.eps, needs_dweight)
        return dx, dweight if needs_dweight else None, None


_rms_norm_bwd = register_op("rms_norm_bwd", _launch_norm_bwd, _fake_norm_bwd)
# what layers that have checked their arguments call: rows whose last dimension is contiguous
rms_norm_rows = register_op("rms_norm_fwd", _launch_norm, _fake_norm, function=_RMSNorm)


def rows_of(
    name: str, x: Tensor, weight: Tensor, eps: float, widths: int, *, mixed: bool = False
) -> Tensor:
    """Check the arguments of a norm; return ``x`` as a matrix of rows."""
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_shape("weight", weight, "D")
    if weight.shape[0] == 0:
        raise ValueError("`weight`: expected [D] with D at least 1, got [0]")
    check_tensor(name, x)
    check_dtype(name, x, *(FLOATS if mixed else (weight.dtype,)))
    width = widths * weight.shape[0]
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"`{name}`: expected [... {width}], got {list(x.shape)}")
    check_device(name, x, weight.device)
    if not eps >= 0:
        raise ValueError(f"`eps`: expected 0 or a positive number, got {eps}")
    rows = x.reshape(-1, width)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension by its root mean square.

    ``y = x / sqrt(mean(x**2) + eps) * weight`` (arXiv:1910.07467, eq. 4), rounded as transformers'
    BitNetRMSNorm rounds: the quotient in float32, cast to the dtype of ``x``, times ``weight``.

    Args:
        x: [..., D] float16, bfloat16 or float32.
        weight: [D] float16, bfloat16 or float32, on the device of ``x``.
        eps: added to the mean square, in units of x squared. Default: 1e-5.

    Returns:
        [..., D] in the wider dtype of ``x`` and ``weight``; differentiable in both. Memory for the
        backward: ``x`` itself.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, or ``eps`` is negative.
        BackendUnavailableError: the forced backend cannot run.
    """
    rows = rows_of("x", x, weight, eps, 1, mixed=True)
    run = _RMSNorm.apply if wants_gradient(x, weight) else rms_norm_rows
    return run(rows, weight, eps).view(x.shape)
