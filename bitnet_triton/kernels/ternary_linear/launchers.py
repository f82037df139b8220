"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from torch import Tensor

from bitnet_triton.kernels.packing import unpack_codes
from bitnet_triton.kernels.quantize.op import quantize_rows
from bitnet_triton.kernels.quantize.reference import quantize_weight_reference
from bitnet_triton.kernels.ternary_linear.compiled import (
    compiled_bit_linear_bwd,
    compiled_bit_linear_fwd,
    compiled_ternary_linear_bwd,
    compiled_ternary_linear_fwd,
)
from bitnet_triton.runtime import Implementation


def _triton_ternary_fwd(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.ternary_linear.decode import launch_ternary_linear_fwd_row
    from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd

    a, a_scale = quantize_rows(x)
    launcher = launch_ternary_linear_fwd_row if x.shape[0] == 1 else launch_ternary_linear_fwd
    return launcher(a, a_scale, packed, scale, bias, x.dtype)


def _triton_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    from bitnet_triton.kernels.ternary_linear.backward import launch_ternary_linear_bwd

    return launch_ternary_linear_bwd(dy, packed, scale)


def _triton_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_triton.kernels.ternary_linear.forward import launch_bit_linear_fwd

    a, a_scale = quantize_rows(x)
    return launch_bit_linear_fwd(a, a_scale, weight, stats, bias, binary, x.dtype), a, a_scale


def _triton_bit_bwd(
    dy: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.ternary_linear.backward import launch_bit_linear_bwd

    return launch_bit_linear_bwd(dy, a, a_scale, weight, stats, binary)


def _float_product(a: Tensor, codes: Tensor) -> Tensor:
    """Multiply integer codes a [M, K] by codes [N, K]; float64 holds every sum exactly."""
    return (a.double() @ codes.double().t()).float()


def _reference_ternary_fwd(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    a, a_scale = quantize_rows(x)
    y = _float_product(a, unpack_codes(packed)) * a_scale * scale
    return (y if bias is None else y + bias).to(x.dtype)


def _reference_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return ((dy.float() @ unpack_codes(packed).float()) * scale).to(dy.dtype)


def _reference_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, a_scale = quantize_rows(x)
    y = _float_product(a, _reference_codes(weight, binary)) * a_scale * stats[0]
    return (y if bias is None else y + bias).to(x.dtype), a, a_scale


def _reference_bit_bwd(
    dy: Tensor, a: Tensor, a_scale: Tensor, weight: Tensor, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor]:
    dx = (dy.float() @ _reference_codes(weight, binary)) * stats[0]
    dweight = (dy.float() * a_scale).t() @ a.float()
    return dx.to(dy.dtype), dweight.to(weight.dtype)


def _reference_codes(weight: Tensor, binary: bool) -> Tensor:
    levels = "binary" if binary else "ternary"
    return quantize_weight_reference(weight.float(), levels=levels)[0]


def _int_mm_objection(x: Tensor, *_: object) -> str | None:
    # torch 2.13 on a CPU: a right operand [1, N] with strides (1, 1) gives wrong products
    return "torch._int_mm is wrong for K = 1" if x.shape[-1] == 1 else None


TERNARY_FWD = {
    "triton": Implementation(_triton_ternary_fwd),
    "compile": Implementation(compiled_ternary_linear_fwd, _int_mm_objection),
    "reference": Implementation(_reference_ternary_fwd),
}
TERNARY_BWD = {
    "triton": Implementation(_triton_ternary_bwd),
    "compile": Implementation(compiled_ternary_linear_bwd),
    "reference": Implementation(_reference_ternary_bwd),
}
BIT_FWD = {
    "triton": Implementation(_triton_bit_fwd),
    "compile": Implementation(compiled_bit_linear_fwd, _int_mm_objection),
    "reference": Implementation(_reference_bit_fwd),
}
BIT_BWD = {
    "triton": Implementation(_triton_bit_bwd),
    "compile": Implementation(compiled_bit_linear_bwd),
    "reference": Implementation(_reference_bit_bwd),
}
