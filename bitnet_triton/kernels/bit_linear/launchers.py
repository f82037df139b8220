"""The launchers of each backend, and the tables that ``select`` chooses from.

Those of the backend ``triton`` choose between two ways: quantised operands are made on the way, for
every tile again (``forward.py``, ``backward.py``), or once, as temporaries in memory (the kernel
"from codes" and ``products.py``). Only the second is fast on a GPU, and only the first on a CPU.
"""

from __future__ import annotations

import functools
import logging

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
from bitnet_triton.runtime.autotune import largest_size

logger = logging.getLogger("bitnet_triton")


def _triton_bit_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.bit_linear.forward import (
        launch_bit_linear_fwd,
        launch_bit_linear_fwd_from_codes,
    )

    a, a_scale = quantize_rows(x)
    # few tokens make each code once or twice on the way, in the time of the pass over memory
    once = _makes_once(x.device) and x.shape[0] > largest_size("bit_linear_fwd")
    run = launch_bit_linear_fwd_from_codes if once else launch_bit_linear_fwd
    return run(a, a_scale, weight, stats, bias, binary, x.dtype), a, a_scale


def _triton_bit_bwd_dx(dy: Tensor, weight: Tensor, stats: Tensor, binary: bool) -> Tensor:
    from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_dx
    from bitnet_triton.kernels.bit_linear.products import library_bit_linear_bwd_dx

    library = _library_multiplies("bit_linear_bwd_dx", dy, torch.float32)
    run = library_bit_linear_bwd_dx if library else launch_bit_linear_bwd_dx
    return run(dy, weight, stats, binary)


def _triton_bit_bwd_dweight(dy: Tensor, a: Tensor, a_scale: Tensor, dtype: torch.dtype) -> Tensor:
    from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_dweight
    from bitnet_triton.kernels.bit_linear.products import (
        dweight_dtype,
        library_bit_linear_bwd_dweight,
    )

    result = dweight_dtype(dy.dtype, dtype)
    library = _library_multiplies("bit_linear_bwd_dweight", dy, result)
    run = library_bit_linear_bwd_dweight if library else launch_bit_linear_bwd_dweight
    return run(dy, a, a_scale, dtype)


def _makes_once(device: torch.device) -> bool:
    """Tell whether operands that are made once, in memory, beat those made for every tile."""
    return device.type == "cuda"


def _library_multiplies(op: str, dy: Tensor, result: torch.dtype) -> bool:
    """Tell whether the backward takes the library's product of dy for a ``result``."""
    from bitnet_triton.kernels.bit_linear.products import product_objection

    if not _makes_once(dy.device):
        return False
    objection = product_objection(dy.dtype, result)
    if objection is not None:
        _log_own_product(op, objection)
    return objection is None


@functools.cache
def _log_own_product(op: str, objection: str) -> None:
    logger.warning("%s multiplies in its own kernel, which is slower (%s)", op, objection)


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
