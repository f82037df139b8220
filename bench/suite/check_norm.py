"""Checks of the quantisers and the norms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.suite.checks import (
    DTYPES,
    Checks,
    assert_all_close,
    assert_codes_close,
    assert_same,
    gradients,
)
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import (
    quantize_activations,
    quantize_weight,
    relu2_mul_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from bitnet_triton.kernels.quantize.reference import (
    quantize_activations_reference,
    quantize_weight_reference,
)
from bitnet_triton.kernels.rms_norm.reference import (
    relu2_mul_norm_quantize_reference,
    rms_norm_quantize_reference,
    rms_norm_reference,
)
from bitnet_triton.testing import assert_close

_EPS = 1e-5
_FUSED = {
    "rms_norm_quantize": (rms_norm_quantize, rms_norm_quantize_reference, 1),
    "relu2_mul_norm_quantize": (relu2_mul_norm_quantize, relu2_mul_norm_quantize_reference, 2),
}


def _check_activations(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    codes, scale = quantize_activations(x)
    exact, exact_scale = quantize_activations_reference(x.double())
    assert_close("scale", scale, exact_scale)
    assert_codes_close(codes, exact)


def _check_weight(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    weight = (0.02 * torch.randn(shape, device=device)).to(dtype)
    codes, scale = quantize_weight(weight)
    exact, exact_scale = quantize_weight_reference(weight.double(), levels="ternary")
    assert_close("scale", scale, exact_scale.view(1))
    assert_codes_close(codes, exact)


def _check_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(shape[1], device=device)).to(dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, eps=_EPS)

    wide = [t.double() for t in (x, weight)]
    assert_all_close(
        gradients(functools.partial(rms_norm, eps=_EPS), (x, weight), dy),
        gradients(norm, wide, dy.double()),
        gradients(norm, (x, weight), dy),
    )


def _check_fused(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    op, reference, widths = _FUSED[name]
    M, D = shape
    x = torch.randn(M, widths * D, device=device).to(dtype)
    weight = (1 + 0.2 * torch.randn(D, device=device)).to(dtype)
    codes, scale, sums = op(x, weight, eps=_EPS)
    # between its steps the kernel rounds to the dtype of a 16-bit model
    rounded = None if dtype == torch.float32 else dtype
    exact, exact_scale, _ = reference(x.double(), weight.double(), eps=_EPS, dtype=rounded)
    # the largest value of a row may itself fall to the other side of a tie of its dtype
    step = 2e-6 if rounded is None else torch.finfo(dtype).eps
    assert_close("scale", scale, exact_scale, rms=step, worst=step * exact_scale.max().item())
    assert_codes_close(codes, exact)
    assert_same("sums", sums, codes.sum(-1, dtype=torch.int32))


def items(plan: Plan) -> Sequence[Item]:
    """Return the checks: rows of one piece, odd rows, and more rows than programs."""
    checks = Checks(plan)
    shapes = [(5, 100), (1, 640)] if plan.small else [(1, 2560), (2049, 6912), (33, 1025)]
    ops: dict[str, Callable[..., None]] = {
        "quantize_activations": _check_activations,
        "rms_norm": _check_norm,
        **{name: functools.partial(_check_fused, name) for name in _FUSED},
    }
    for i, shape in enumerate(shapes):
        for dtype_name, dtype in DTYPES.items():
            for op, check in ops.items():
                run = functools.partial(check, shape, dtype, plan.device)
                what = f"{shape[0]}x{shape[1]} {dtype_name}"
                checks.add(op, what, run, essential=i == 0 and dtype_name == "bf16")
    for dtype_name, dtype in DTYPES.items():
        shape = (24, 40) if plan.small else (6912, 2560)
        run = functools.partial(_check_weight, shape, dtype, plan.device)
        checks.add("quantize_weight", dtype_name, run, essential=dtype_name == "bf16")
    return checks.essential_first()
