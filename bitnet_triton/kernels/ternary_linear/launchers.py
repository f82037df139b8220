"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitnet_triton.kernels.common.linear import float_product, int_mm_objection
from bitnet_triton.kernels.packing import CODES_PER_BYTE, unpack_codes
from bitnet_triton.kernels.quantize.op import quantize_rows
from bitnet_triton.kernels.ternary_linear.compiled import (
    compiled_ternary_linear_bwd,
    compiled_ternary_linear_fwd,
    reads_packed,
)
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.autotune import has_tiles, largest_size
from bitnet_triton.runtime.device import smallest_dot


def _triton_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    a, a_scale, a_sum = _quantize_with_sums(x)
    rows = packed.shape[:1]
    launch = packed_launcher(x, packed)
    return launch(a, a_scale, a_sum, packed, scale, bias, None, rows, x.dtype)


def packed_launcher(x: Tensor, packed: Tensor) -> Callable[..., Tensor]:
    """Return the launcher of the kernel that multiplies as many rows as x [M, K] has."""
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.ternary_linear.decode import launch_ternary_linear_fwd_few
    from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd
    from bitnet_triton.kernels.ternary_linear.gemv import in_words, launch_ternary_linear_fwd_one
    from bitnet_triton.kernels.ternary_linear.tiles import IN_PLACE_K

    M, K = x.shape
    if smallest_dot(x.device) == 1 or K >= IN_PLACE_K:
        return launch_ternary_linear_fwd
    if M == 1 and has_tiles("ternary_linear_fwd_one", x.device) and in_words(x, packed):
        return launch_ternary_linear_fwd_one
    few = largest_size("ternary_linear_fwd_few") >= M
    return launch_ternary_linear_fwd_few if few else launch_ternary_linear_fwd


def _triton_quantized_fwd(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    launch = packed_launcher(a, packed)
    return launch(a, a_scale, a_sum, packed, scale, None, residual, rows, dtype)


def _reference_quantized_fwd(
    a: Tensor, a_scale: Tensor, a_sum: Tensor, packed: Tensor, scale: Tensor,
    residual: Tensor | None, rows: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    parts = zip(packed.split(list(rows)), scale.split(1))
    y = torch.cat([float_product(a, unpack_codes(p)) * (a_scale * s) for p, s in parts], dim=1)
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


def _reference_ternary_fwd(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    a, a_scale = quantize_rows(x)
    y = float_product(a, unpack_codes(packed)) * (a_scale * scale)
    return (y if bias is None else y + bias).to(x.dtype)


def _reference_ternary_bwd(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return ((dy.float() @ unpack_codes(packed).float()) * scale).to(dy.dtype)


def _compiled_ternary_objection(x: Tensor, packed: Tensor) -> str | None:
    return None if reads_packed(x) else int_mm_objection(x, CODES_PER_BYTE * packed.shape[0])


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
