"""The public ops that end in int8 codes, for what multiplies packed weights next.

For inference, not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_tensor
from bitnet_triton.kernels.common.linear import FLOATS
from bitnet_triton.kernels.rms_norm.op import program_objection, rows_of
from bitnet_triton.kernels.rms_norm.reference import (
    relu2_mul_norm_quantize_reference,
    rms_norm_quantize_reference,
    silu_mul_quantize_reference,
)
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.autotune import largest_size

Quantized = tuple[Tensor, Tensor, Tensor]


def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.rms_norm.forward import launch_rms_norm_quantize

    return launch_rms_norm_quantize(x, weight, eps)


def _triton_relu2(gate_up: Tensor, weight: Tensor, eps: float) -> Quantized:
    from bitnet_triton.kernels.rms_norm.forward import launch_relu2_mul_norm_quantize

    return launch_relu2_mul_norm_quantize(gate_up, weight, eps)


def _triton_silu(gate_up: Tensor) -> Quantized:
    from bitnet_triton.kernels.rms_norm.forward import launch_silu_mul_quantize

    return launch_silu_mul_quantize(gate_up)


def _silu_objection(F: int) -> str | None:
    largest = largest_size("silu_mul_quantize_fwd")
    return None if largest >= F else f"a program holds a row of at most {largest} values"


def _reference_norm(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    wide, dtype = x.float(), x.dtype
    return _integers(*rms_norm_quantize_reference(wide, weight.float(), eps=eps, dtype=dtype))


def _reference_relu2(gate_up: Tensor, weight: Tensor, eps: float) -> Quantized:
    wide, dtype = gate_up.float(), gate_up.dtype
    return _integers(*relu2_mul_norm_quantize_reference(wide, weight.float(), eps=eps, dtype=dtype))


def _reference_silu(gate_up: Tensor) -> Quantized:
    return _integers(*silu_mul_quantize_reference(gate_up.float(), dtype=gate_up.dtype))


def _integers(codes: Tensor, scale: Tensor, sums: Tensor) -> Quantized:
    return codes.to(torch.int8), scale, sums.to(torch.int32)


NORM_QUANTIZE_FWD = {
    "triton": Implementation(_triton_norm, program_objection),
    "reference": Implementation(_reference_norm),
}
RELU2_FWD = {
    "triton": Implementation(_triton_relu2, program_objection),
    "reference": Implementation(_reference_relu2),
}
SILU_FWD = {
    "triton": Implementation(_triton_silu, _silu_objection),
    "reference": Implementation(_reference_silu),
}


def _launch_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fake(x, weight, eps)
    return select("rms_norm_quantize", NORM_QUANTIZE_FWD, x.device, weight)(x, weight, eps)


def _launch_relu2(gate_up: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if gate_up.shape[0] == 0:
        return _fake(gate_up, weight, eps)
    run = select("relu2_mul_norm_quantize", RELU2_FWD, gate_up.device, weight)
    return run(gate_up, weight, eps)


def _launch_silu(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if gate_up.shape[0] == 0:
        return _fake_silu(gate_up)
    F = gate_up.shape[1] // 2
    return select("silu_mul_quantize", SILU_FWD, gate_up.device, F)(gate_up)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, weight.shape[0])


def _fake_silu(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(gate_up, gate_up.shape[1] // 2)


def _empty(x: Tensor, D: int) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    return (
        x.new_empty((M, D), dtype=torch.int8),
        x.new_empty((M, 1), dtype=torch.float32),
        x.new_empty((M,), dtype=torch.int32),
    )


# what layers that have checked their arguments call: rows whose last dimension is contiguous
rms_norm_quantize_rows = register_op("rms_norm_quantize_fwd", _launch_norm, _fake)
relu2_mul_norm_quantize_rows = register_op("relu2_mul_norm_quantize_fwd", _launch_relu2, _fake)
silu_mul_quantize_rows = register_op("silu_mul_quantize_fwd", _launch_silu, _fake_silu)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise as ``rms_norm`` does and quantise as ``quantize_activations`` does, in one pass.

    For inference, not differentiable. The codes are those of the two ops one after the other.

    Args:
        x: [..., D] float16, bfloat16 or float32.
        weight: [D] in the dtype and on the device of ``x``.
        eps: added to the mean square, in units of x squared. Default: 1e-5.

    Returns:
        int8 codes [..., D], float32 scale [..., 1] and int32 sums of the codes [...], which
        ``ternary_linear_quantized`` takes.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, or ``eps`` is negative.
        BackendUnavailableError: the forced backend cannot run.
    """
    rows = rows_of("x", x, weight, eps, 1).detach()
    return _shaped(x, rms_norm_quantize_rows(rows, weight.detach(), eps))


def relu2_mul_norm_quantize(
    gate_up: Tensor, weight: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``relu(gate)**2 * up``, normalise and quantise it, in one pass.

    The inside of BitNet's feed-forward layer (arXiv:2504.12285), between its packed linears. For
    inference, not differentiable. Rounded to the dtype of ``gate_up`` after the square, the
    product and as ``rms_norm``.

    Args:
        gate_up: [..., 2 F] float16, bfloat16 or float32: gate, then up.
        weight: [F] of the sub-norm, in the dtype and on the device of ``gate_up``.
        eps: added to the mean square, in units of the product squared. Default: 1e-5.

    Returns:
        int8 codes [..., F], float32 scale [..., 1] and int32 sums of the codes [...].

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, or ``eps`` is negative.
        BackendUnavailableError: the forced backend cannot run.
    """
    rows = rows_of("gate_up", gate_up, weight, eps, 2).detach()
    return _shaped(gate_up, relu2_mul_norm_quantize_rows(rows, weight.detach(), eps))


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``silu(gate) * up`` and quantise it, in one pass.

    The inside of Llama's feed-forward layer (arXiv:2002.05202, eq. 6), between packed linears. For
    inference, not differentiable. Rounded to the dtype of ``gate_up`` after silu and the product.

    Args:
        gate_up: [..., 2 F] float16, bfloat16 or float32: gate, then up.

    Returns:
        int8 codes [..., F], float32 scale [..., 1] and int32 sums of the codes [...].

    Raises:
        TypeError: ``gate_up`` is no tensor of one of these dtypes.
        ValueError: its last dimension is not even and positive.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("gate_up", gate_up)
    check_dtype("gate_up", gate_up, *FLOATS)
    if gate_up.ndim == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        wanted = "[... 2*F] with F at least 1"
        raise ValueError(f"`gate_up`: expected {wanted}, got {list(gate_up.shape)}")
    rows = gate_up.detach().reshape(-1, gate_up.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return _shaped(gate_up, silu_mul_quantize_rows(rows))


def _shaped(x: Tensor, quantized: Quantized) -> Quantized:
    codes, scale, sums = quantized
    leading = x.shape[:-1]
    return codes.view(*leading, codes.shape[1]), scale.view(*leading, 1), sums.view(leading)
