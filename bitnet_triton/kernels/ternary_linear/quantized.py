"""The public ternary linear of activations that are quantised already, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_tensor,
)
from bitnet_triton.kernels.packing import CODES_PER_BYTE, TernaryWeight
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.kernels.ternary_linear.launchers import QUANTIZED_FWD
from bitnet_triton.kernels.ternary_linear.merged import MergedTernaryWeight
from bitnet_triton.runtime import register_op, select


def _launch(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if a.shape[0] == 0:
        return _fake(a, a_scale, a_sum, packed, scale, residual, rows, dtype)
    run = select("ternary_linear_quantized", QUANTIZED_FWD, a.device)
    return run(a, a_scale, a_sum, packed, scale, residual, rows, dtype)


def _fake(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], CODES_PER_BYTE * packed.shape[0]), dtype=dtype)


# what layers that have checked their arguments call: contiguous matrices
ternary_linear_quantized_rows = register_op("ternary_linear_quantized_fwd", _launch, _fake)


def ternary_linear_quantized(
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    weight: TernaryWeight | MergedTernaryWeight,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply activations that are int8 already by packed ternary weights, and add a residual.

    ``y = (sum_k a w) * scale * weight.scale``, rounded to its dtype, ``+ residual``: the product of
    ``ternary_linear`` after a kernel that quantises its output, such as ``rms_norm_quantize``. For
    inference, not differentiable.

    Args:
        codes: [..., K] int8.
        scale: [..., 1] float32.
        sums: [...] int32, the sum of each row of codes.
        weight: a ternary matrix [N, K], or several, merged, on the device of ``codes``.
        residual: [..., N] float16, bfloat16 or float32, or None.
        dtype: of the result; default: that of ``residual``. One of the two is needed.

    Returns:
        [..., N].

    Raises:
        TypeError: ``weight`` is no ternary weight, a tensor has a wrong dtype, or ``dtype`` is none
            of the three, or not that of ``residual``.
        ValueError: shapes do not fit, or a tensor is on another device.
        BackendUnavailableError: the forced backend cannot run.
    """
    if not isinstance(weight, (TernaryWeight, MergedTernaryWeight)):
        raise TypeError(
            "`weight`: expected a TernaryWeight or a MergedTernaryWeight, got "
            f"{type(weight).__name__}"
        )
    dtype = _checked_dtype(dtype, residual)
    N, K = weight.shape
    _check_codes(codes, scale, sums, K, weight.device)
    leading = codes.shape[:-1]
    if residual is not None:
        if residual.shape != (*leading, N):
            wanted = [*leading, N]
            raise ValueError(f"`residual`: expected {wanted}, got {list(residual.shape)}")
        check_device("residual", residual, weight.device)
        residual = residual.detach().reshape(-1, N).contiguous()
    rows = weight.rows if isinstance(weight, MergedTernaryWeight) else weight.packed.shape[:1]
    y = ternary_linear_quantized_rows(
        codes.reshape(-1, K).contiguous(), scale.reshape(-1, 1).contiguous(),
        sums.reshape(-1).contiguous(), weight.packed.contiguous(), weight.scale, residual,
        list(rows), dtype,
    )  # fmt: skip
    return y.view(*leading, N)


def _checked_dtype(dtype: torch.dtype | None, residual: Tensor | None) -> torch.dtype:
    if residual is not None:
        check_tensor("residual", residual)
        check_dtype("residual", residual, *((dtype,) if dtype else FLOATS))
        dtype = residual.dtype
    if dtype not in FLOATS:
        raise TypeError(f"`dtype`: expected float32, float16 or bfloat16, got {dtype}")
    return dtype


def _check_codes(codes: Tensor, scale: Tensor, sums: Tensor, K: int, device: torch.device) -> None:
    check_tensor("codes", codes)
    check_dtype("codes", codes, torch.int8)
    if codes.ndim == 0 or codes.shape[-1] != K:
        raise ValueError(f"`codes`: expected [... K] with K={K}, got {list(codes.shape)}")
    check_device("codes", codes, device)
    leading = tuple(codes.shape[:-1])
    for name, value, dtype, shape in (
        ("scale", scale, torch.float32, (*leading, 1)),
        ("sums", sums, torch.int32, leading),
    ):
        check_tensor(name, value)
        check_dtype(name, value, dtype)
        if tuple(value.shape) != shape:
            raise ValueError(f"`{name}`: expected {list(shape)}, got {list(value.shape)}")
        check_device(name, value, device)
