"""The public dense linear, for inference: output heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_matrix,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.linear import MOST_BEST, check_best, largest_outputs
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


def _triton_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.dense_linear.forward import launch_dense_linear_topk

    return launch_dense_linear_topk(x, weight, bias, k)


def _triton_objection(x: Tensor, weight: Tensor, k: int = 1) -> str | None:
    if smallest_dot(x.device) > 1:
        return f"PyTorch's product of a few rows is as fast on `{x.device.type}`"
    if x.shape[0] > MOST_ROWS:
        return f"PyTorch's product is faster from {MOST_ROWS + 1} rows on"
    if k > MOST_BEST:
        return f"programs keep the best {MOST_BEST} at most"
    return None if x.dtype == weight.dtype else "`x` and `weight` differ in dtype"


def _torch_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _torch_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return largest_outputs(F.linear(x, weight, bias), k)


def _reference_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    return largest_outputs(dense_linear_reference(x, weight, bias), k)


DENSE_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    # one call of PyTorch: there is nothing to compile
    "compile": Implementation(_torch_fwd),
    "reference": Implementation(dense_linear_reference),
}
DENSE_TOPK = {
    "triton": Implementation(_triton_topk, _triton_objection),
    "compile": Implementation(_torch_topk),
    "reference": Implementation(_reference_topk),
}


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return _fake(x, weight, bias)
    run = select("dense_linear", DENSE_FWD, x.device, x, weight)
    return run(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _launch_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake_topk(x, weight, bias, k)
    run = select("dense_linear_topk", DENSE_TOPK, x.device, x, weight, k)
    return run(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), k)


def _fake_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


_dense_linear_fwd = register_op("dense_linear_fwd", _launch, _fake)
_dense_linear_topk_fwd = register_op("dense_linear_topk_fwd", _launch_topk, _fake_topk)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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
    _check(x, weight, bias)
    N, K = weight.shape
    return _dense_linear_fwd(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], N)


def dense_linear_topk(
    x: Tensor, weight: Tensor, k: int = 1, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest outputs of ``dense_linear``, without writing the others where it can.

    Not differentiable.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [N, K] in the dtype and on the device of ``x``.
        k: how many, 1 to N; up to 16 in the kernel. Default: 1, which is greedy decoding.
        bias: [N] in the dtype of ``x``, or None.

    Returns:
        values [..., k] in the dtype of ``x``, largest first, and their int64 indices [..., k]: of
        equal values the smaller index first, NaN before all numbers, as ``torch.argmax`` has it.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: ``k`` is not 1 to N, shapes do not fit, or a tensor is on another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check(x, weight, bias)
    N, K = weight.shape
    check_best(k, N)
    leading = x.shape[:-1]
    values, indices = _dense_linear_topk_fwd(x.reshape(-1, K), weight, bias, k)
    return values.view(*leading, k), indices.view(*leading, k)
