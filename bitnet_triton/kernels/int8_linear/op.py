"""The public linear with int8 weights, for inference: output heads."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.linear import (
    MOST_BEST,
    cast_by_autocast,
    check_best,
    check_bias,
    check_input,
    contiguous,
    largest_outputs,
)
from bitnet_triton.kernels.int8_linear.reference import (
    int8_product_reference,
    split_activations_reference,
)
from bitnet_triton.kernels.int8_linear.weight import Int8Weight
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.autotune import largest_size

# rows of the weight that the reference widens at a time
_ROWS_AT_ONCE = 8192


def _triton_fwd(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.int8_linear.forward import launch_int8_linear

    return launch_int8_linear(x, codes, scale, bias)


def _triton_topk(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.int8_linear.forward import launch_int8_linear_topk

    return launch_int8_linear_topk(x, codes, scale, bias, k)


def _reference_fwd(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Sum in float64, which holds every sum exactly, a part of the weight at a time."""
    # split in float32, as the kernel does: beside a tie float64 rounds another way
    high, low, step = split_activations_reference(x.float())
    y = [
        int8_product_reference(high.double(), low.double(), step, c.double(), s, None).float()
        for c, s in zip(codes.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE))
    ]
    total = torch.cat(y, dim=1)
    return (total if bias is None else total + bias).to(x.dtype)


def _reference_topk(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    return largest_outputs(_reference_fwd(x, codes, scale, bias), k)


_WIDEST = largest_size("split_activations_fwd")


def _triton_objection(K: int, k: int = 1) -> str | None:
    if K > _WIDEST:
        return f"a program splits a row of at most {_WIDEST} values"
    return None if k <= MOST_BEST else f"programs keep the best {MOST_BEST} at most"


INT8_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    "reference": Implementation(_reference_fwd),
}
INT8_TOPK = {
    "triton": Implementation(_triton_topk, _triton_objection),
    "reference": Implementation(_reference_topk),
}


def _launch(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return _fake(x, codes, scale, bias)
    run = select("int8_linear", INT8_FWD, x.device, x.shape[1])
    return run(x.contiguous(), codes, scale, contiguous(bias))


def _fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _launch_topk(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake_topk(x, codes, scale, bias, k)
    run = select("int8_linear_topk", INT8_TOPK, x.device, x.shape[1], k)
    return run(x.contiguous(), codes, scale, contiguous(bias), k)


def _fake_topk(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


# what layers that have checked their arguments call
int8_linear_rows = register_op("int8_linear_fwd", _launch, _fake)
int8_linear_topk_rows = register_op("int8_linear_topk_fwd", _launch_topk, _fake_topk)


def _checked(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """Check the arguments; return ``x`` without gradients, as autocast wants it."""
    if not isinstance(weight, Int8Weight):
        raise TypeError(
            f"`weight`: expected an Int8Weight, got {type(weight).__name__}; "
            "see Int8Weight.from_dense"
        )
    N, K = weight.shape
    check_input(x, K, weight.device)
    check_bias(bias, N, weight.device)
    return cast_by_autocast(x.detach())


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight that is stored in eight bits.

    ``y = (sum_k q w) * step * weight.scale + bias``, with ``q = round(x / step)`` of fifteen bits
    and a sign, ``step = max|x| / 16319`` for each token: what is lost is lost by the weight. The
    integer sums are exact. For inference, not differentiable.

    Args:
        x: [..., K] float16, bfloat16 or float32. Under autocast it is cast as for any linear.
        weight: a matrix [N, K] on the device of ``x``.
        bias: [N] float16, bfloat16 or float32, or None.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        TypeError: ``weight`` is no Int8Weight; a tensor has a wrong dtype.
        ValueError: ``x`` is not [..., K], ``bias`` is not [N], or they are on another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    x = _checked(x, weight, bias)
    N, K = weight.shape
    y = int8_linear_rows(x.reshape(-1, K), weight.codes, weight.scale, _detached(bias))
    return y.view(*x.shape[:-1], N)


def int8_linear_topk(
    x: Tensor, weight: Int8Weight, k: int = 1, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest outputs of ``int8_linear``, without writing the others.

    Args:
        x: [..., K] float16, bfloat16 or float32. Under autocast it is cast as for any linear.
        weight: a matrix [N, K] on the device of ``x``.
        k: how many, 1 to N; up to 16 in the kernel. Default: 1, which is greedy decoding.
        bias: [N] float16, bfloat16 or float32, or None.

    Returns:
        values [..., k] in the dtype of ``x``, largest first, and their int64 indices [..., k]: of
        equal values the smaller index first, NaN before all numbers, as ``torch.argmax`` has it.

    Raises:
        TypeError: ``weight`` is no Int8Weight; a tensor has a wrong dtype.
        ValueError: ``k`` is not 1 to N; ``x`` is not [..., K], ``bias`` is not [N], or they are on
            another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    x = _checked(x, weight, bias)
    N, K = weight.shape
    check_best(k, N)
    rows, leading = x.reshape(-1, K), x.shape[:-1]
    values, indices = int8_linear_topk_rows(rows, weight.codes, weight.scale, _detached(bias), k)
    return values.view(*leading, k), indices.view(*leading, k)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
