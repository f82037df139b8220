"""Triton backward of RMSNorm: one program takes some rows, and sums its part of dweight.

With n = x / rms(x) and g = dy weight: dx = (g - n mean(g n)) / rms(x), dweight = sum of dy n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles

# Partial sums of dweight: enough programs for any device, and a small matrix to add up
_MOST_PROGRAMS = 512


@triton.jit
def _rms_norm_bwd_kernel(
    # tensors: dy, x, dx [M, D]; weight [D]; sums [programs, D] float32
    dy_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr,
    # strides, in elements
    dy_stride_m, x_stride_m,
    # sizes and scalars
    M, D, ROWS, eps,
    # compile-time
    WITH_DWEIGHT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < D
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK_D]
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(program * ROWS, tl.minimum((program + 1) * ROWS, M)):
        # int64: row * stride overflows int32 from 2**31 elements on
        row = tl.cast(i, tl.int64)
        x = tl.load(x_ptr + row * x_stride_m + cols, mask=in_row, other=0.0)  # [BLOCK_D]
        dy = tl.load(dy_ptr + row * dy_stride_m + cols, mask=in_row, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        mean_square = tl.div_rn(tl.sum(wide * wide, axis=0), D * 1.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
        n = wide * rstd
        g = dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=0) / D))
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
        if WITH_DWEIGHT:
            # the forward scales n as it is rounded to the dtype of x
            sums += dy * n.to(x.dtype).to(tl.float32)
    if WITH_DWEIGHT:
        tl.store(sums_ptr + program.to(tl.int64) * D + cols, sums, mask=in_row)


def launch_rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Map dy and x [M, D] to dx [M, D] and dweight [D], in their dtypes; dweight may be empty."""
    M, D = x.shape
    rows = cdiv(M, _MOST_PROGRAMS)
    programs = cdiv(M, rows)
    dx = torch.empty((M, D), dtype=x.dtype, device=x.device)
    sums = torch.empty((programs if with_dweight else 0, D), dtype=torch.float32, device=x.device)
    launch(_rms_norm_bwd_kernel, (programs,))(
        dy, x, weight, dx, sums,
        dy.stride(0), x.stride(0),
        M, D, rows, eps,
        WITH_DWEIGHT=with_dweight,
        **tiles("rms_norm_bwd", D, x.device),
    )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)
