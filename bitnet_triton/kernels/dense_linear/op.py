"""The public dense linear, for inference: output heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_matrix,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.dense_linear.reference import dense_linear_reference
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.device import smallest_dot

# From here on PyTorch's product keeps up
MOST_ROWS = 4


def _triton_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # imported on first use: loading Triton takes longer than loading this package
    from bitnet_triton.kernels.dense_linear.forward import launch_dense_linear

    return launch_dense_linear(x, weight, bias)


def _triton_objection(x: Tensor, weight: Tensor) -> str | None:
    if smallest_dot(x.device) > 1:
        return f"PyTorch's product of a few rows is as fast on `{x.device.type}`"
    if x.shape[0] > MOST_ROWS:
        return f"PyTorch's product is faster from {MOST_ROWS + 1} rows on"
    return None if x.dtype == weight.dtype else "`x` and `weight` differ in dtype"


def _torch_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


DENSE_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    # one call of PyTorch: there is nothing to compile
    "compile": Implementation(_torch_fwd),
    "reference": Implementation(dense_linear_reference),
}


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return _fake(x, weight, bias)
    run = select("dense_linear", DENSE_FWD, x.device, x, weight)
    return run(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_dense_linear_fwd = register_op("dense_linear_fwd", _launch, _fake)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a dense weight, as ``torch.nn.functional.linear`` does: ``y = x W^T + b``.

    For a few rows on a CPU it reads the weight at the speed of memory, which PyTorch's product
    does not. Not differentiable.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [N, K] in the dtype and on the device of ``x``.
        bias: [N] in the dtype of ``x``, or None.

    Returns:
        [..., N] in the dtype of ``x``; sums are float32.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, or a tensor is on another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("weight", weight)
    check_dtype("weight", weight, *FLOATS)
    check_matrix("weight", weight)
    N, K = weight.shape
    check_tensor("x", x)
    check_dtype("x", x, weight.dtype)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"`x`: expected [... K] with K={K}, got {list(x.shape)}")
    check_device("x", x, weight.device)
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias", bias, weight.dtype)
        check_shape("bias", bias, "N", N=N)
        check_device("bias", bias, weight.device)
    return _dense_linear_fwd(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], N)
