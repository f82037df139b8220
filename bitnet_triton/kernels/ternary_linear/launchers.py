"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitnet_triton.kernels.packing import CODES_PER_BYTE, unpack_codes
from bitnet_triton.kernels.quantize.op import quantize_rows
from bitnet_triton.kernels.quantize.reference import weight_codes_reference
from bitnet_triton.kernels.ternary_linear.compiled import (
    compiled_bit_linear_bwd_dweight,
    compiled_bit_linear_bwd_dx,
    compiled_bit_linear_fwd,
    compiled_ternary_linear_bwd,
    compiled_ternary_linear_fwd,
    reads_packed,
)
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.autotune import largest_size
from bitnet_triton.runtime.device import smallest_dot


def _triton_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    a, a_scale, a_sum = _quantize_with_sums(x)
    rows = packed.shape[:1]
    return _packed_launcher(x)(a, a_scale, a_sum, packed, scale, bias, None, rows, x.dtype)


def _packed_launcher(x: Tensor) -> Callable[..., Tensor]:
    """Return the launcher of the kernel that multiplies as many rows as x [M, K] has."""
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.ternary_linear.decode import launch_ternary_linear_fwd_row
    from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd

    alone = x.shape[0] == 1 and smallest_dot(x.device) > 1
    return launch_ternary_linear_fwd_row if alone else launch_ternary_linear_fwd


def _triton_quantized_fwd(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _packed_launcher(a)(a, a_scale, a_sum, packed, scale, None, residual, rows, dtype)


def _reference_quantized_fwd(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    parts = zip(packed.split(list(rows)), scale.split(1))
    y = torch.cat([_float_product(a, unpack_codes(p)) * (a_scale * s) for p, s in parts], dim=1)
    return y.to(dtype) if residual is None else residual + y.to(dtype)


def _quantize_with_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes, their scales and their sums, in one launch if a program holds a row."""
    from bitnet_triton.kernels.quantize.forward import launch_quantize_with_sums

    if x.shape[1] <= largest_size("quantize_activations_fwd"):
        return launch_quantize_with_sums(x)
    a, a_scale = quantize_rows(x)
    return a, a_scale, a.sum(-1, dtype=torch.int32)


def _triton_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    from bitnet_triton.kernels.ternary_linear.backward import launch_ternary_linear_bwd

    return launch_ternary_linear_bwd(dy, packed, scale)


def _triton_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_triton.kernels.ternary_linear.forward import launch_bit_linear_fwd

    a, a_scale = quantize_rows(x)
    return launch_bit_linear_fwd(a, a_scale, weight, stats, bias, binary, x.dtype), a, a_scale


def _triton_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    from bitnet_triton.kernels.ternary_linear.backward import launch_bit_linear_bwd_dx

    return launch_bit_linear_bwd_dx(dy, weight, stats, binary)


def _triton_bit_bwd_dweight(dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    from bitnet_triton.kernels.ternary_linear.backward import launch_bit_linear_bwd_dweight

    return launch_bit_linear_bwd_dweight(dy, a, a_scale, dtype)


def _float_product(a: Tensor, codes: Tensor) -> Tensor:
    """Multiply integer codes a [M, K] by codes [N, K]; float64 holds every sum exactly."""
    return (a.double() @ codes.double().t()).float()


def _reference_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    a, a_scale = quantize_rows(x)
    y = _float_product(a, unpack_codes(packed)) * (a_scale * scale)
    return (y if bias is None else y + bias).to(x.dtype)


def _reference_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return ((dy.float() @ unpack_codes(packed).float()) * scale).to(dy.dtype)


def _reference_codes(weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    levels = "binary" if binary else "ternary"
    return weight_codes_reference(weight.float(), stats, levels=levels)


def _reference_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, a_scale = quantize_rows(x)
    y = _float_product(a, _reference_codes(weight, stats, binary)) * (a_scale * stats[0])
    return (y if bias is None else y + bias).to(x.dtype), a, a_scale


def _reference_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    dx = (dy.float() @ _reference_codes(weight, stats, binary)) * stats[0]
    return dx.to(dy.dtype)


def _reference_bit_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return (dy.float().t() @ (a * a_scale)).to(dtype)


def _int_mm_objection(x: Tensor, N: int) -> str | None:
    M, K = x.shape
    if x.device.type == "cpu":
        # torch 2.13: a right operand [1, N] with strides (1, 1) gives wrong products
        return "torch._int_mm is wrong for K = 1" if K == 1 else None
    if M <= 16 or K % 8 or N % 8:
        return f"torch._int_mm needs M > 16, K and N multiples of 8 on `{x.device.type}`"
    return None


def _compiled_ternary_objection(x: Tensor, packed: Tensor) -> str | None:
    return None if reads_packed(x) else _int_mm_objection(x, CODES_PER_BYTE * packed.shape[0])


def _compiled_bit_objection(x: Tensor, weight: Tensor) -> str | None:
    return _int_mm_objection(x, weight.shape[0])


TERNARY_FWD = {
    "triton": Implementation(_triton_ternary_fwd),
    "compile": Implementation(compiled_ternary_linear_fwd, _compiled_ternary_objection),
    "reference": Implementation(_reference_ternary_fwd),
}
QUANTIZED_FWD = {
    "triton": Implementation(_triton_quantized_fwd),
    "reference": Implementation(_reference_quantized_fwd),
}
TERNARY_BWD = {
    "triton": Implementation(_triton_ternary_bwd),
    "compile": Implementation(compiled_ternary_linear_bwd),
    "reference": Implementation(_reference_ternary_bwd),
}
BIT_FWD = {
    "triton": Implementation(_triton_bit_fwd),
    "compile": Implementation(compiled_bit_linear_fwd, _compiled_bit_objection),
    "reference": Implementation(_reference_bit_fwd),
}
BIT_BWD_DX = {
    "triton": Implementation(_triton_bit_bwd_dx),
    "compile": Implementation(compiled_bit_linear_bwd_dx),
    "reference": Implementation(_reference_bit_bwd_dx),
}
BIT_BWD_DWEIGHT = {
    "triton": Implementation(_triton_bit_bwd_dweight),
    "compile": Implementation(compiled_bit_linear_bwd_dweight),
    "reference": Implementation(_reference_bit_bwd_dweight),
}
