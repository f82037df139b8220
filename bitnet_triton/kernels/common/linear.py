"""What the ops that multiply by a weight matrix share around their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.runtime.device import autocast_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# of the outputs of a product that a kernel keeps: it finds one in a round
MOST_BEST = 16


def check_input(x: Tensor, K: int, device: torch.device) -> None:
    """Raise unless ``x`` is a float tensor [..., K] on ``device``."""
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"`x`: expected [... K] with K={K}, got {list(x.shape)}")
    check_device("x", x, device)


def check_bias(bias: Tensor | None, N: int, device: torch.device) -> None:
    """Raise unless ``bias`` is None or a float tensor [N] on ``device``."""
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, "N", N=N)
        check_device("bias", bias, device)


def cast_by_autocast(x: Tensor) -> Tensor:
    """Cast ``x`` as torch.autocast casts the input of any linear."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None else x.to(dtype)


def wants_gradient(*args: Tensor | None) -> bool:
    """Tell whether autograd has to see a call; leaving it out saves some 30 microseconds."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)


def contiguous(bias: Tensor | None) -> Tensor | None:
    """Return an optional tensor without gaps."""
    return None if bias is None else bias.contiguous()


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum dy [M, N] over the rows in float32."""
    return dy.sum(0, dtype=torch.float32).to(dtype)


def float_product(a: Tensor, codes: Tensor) -> Tensor:
    """Multiply integer codes a [M, K] by codes [N, K]; float64 holds every sum exactly."""
    return (a.double() @ codes.double().t()).float()


def largest_outputs(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of y [M, N], largest first, of equal ones the smaller index first."""
    if k == 1:
        # documented to return the first of several maxima, and much faster than a sort
        indices = y.argmax(-1, keepdim=True)
        return y.gather(-1, indices), indices
    values, indices = y.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def check_best(k: int, N: int) -> None:
    """Raise unless ``k`` of N outputs can be the largest."""
    if not isinstance(k, int) or not 1 <= k <= N:
        raise ValueError(f"`k`: expected an integer from 1 to N={N}, got {k}")


def int_mm_objection(x: Tensor, N: int) -> str | None:
    """Say why ``torch._int_mm`` cannot multiply x [M, K] by [N, K]; None when it can."""
    M, K = x.shape
    if x.device.type == "cpu":
        # torch 2.13: a right operand [1, N] with strides (1, 1) gives wrong products
        return "torch._int_mm is wrong for K = 1" if K == 1 else None
    if M <= 16 or K % 8 or N % 8:
        return f"torch._int_mm needs M > 16, K and N multiples of 8 on `{x.device.type}`"
    return None
