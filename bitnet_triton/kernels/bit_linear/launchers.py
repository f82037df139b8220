"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.bit_linear.compiled import (
    compiled_bit_linear_bwd_dweight,
    compiled_bit_linear_bwd_dx,
    compiled_bit_linear_fwd,
)
from bitnet_triton.kernels.common.linear import float_product, int_mm_objection
from bitnet_triton.kernels.quantize.op import quantize_rows
from bitnet_triton.kernels.quantize.reference import weight_codes_reference
from bitnet_triton.runtime import Implementation


def _triton_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_triton.kernels.bit_linear.forward import launch_bit_linear_fwd

    a, a_scale = quantize_rows(x)
    return launch_bit_linear_fwd(a, a_scale, weight, stats, bias, binary, x.dtype), a, a_scale


def _triton_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_dx

    return launch_bit_linear_bwd_dx(dy, weight, stats, binary)


def _triton_bit_bwd_dweight(dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_dweight

    return launch_bit_linear_bwd_dweight(dy, a, a_scale, dtype)


def _reference_codes(weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    levels = "binary" if binary else "ternary"
    return weight_codes_reference(weight.float(), stats, levels=levels)


def _reference_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, a_scale = quantize_rows(x)
    y = float_product(a, _reference_codes(weight, stats, binary)) * (a_scale * stats[0])
    return (y if bias is None else y + bias).to(x.dtype), a, a_scale


def _reference_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    dx = (dy.float() @ _reference_codes(weight, stats, binary)) * stats[0]
    return dx.to(dy.dtype)


def _reference_bit_bwd_dweight(
    dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return (dy.float().t() @ (a * a_scale)).to(dtype)


def _compiled_bit_objection(x: Tensor, weight: Tensor) -> str | None:
    return int_mm_objection(x, weight.shape[0])


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
