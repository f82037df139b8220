"""Triton rotation by a Hadamard matrix, which is read from memory: a product, as sizes are small.

One program rotates BLOCK_M rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.hadamard.reference import hadamard_reference
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _hadamard_fwd_kernel(
    # tensors: x [M, D]; matrix float32 [D, D]; y [M, D]
    x_ptr, matrix_ptr, y_ptr,
    # strides, in elements
    x_stride_m,
    # sizes
    M,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    # int64: row * stride overflows int32 from 2**31 elements on
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    is_row = row < M
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_x = is_row[:, None] & (k < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_m + k[None, :], mask=is_x, other=0.0)
        is_value = (k < D)[:, None] & (cols < D)[None, :]
        matrix = tl.load(matrix_ptr + k[:, None] * D + cols[None, :], mask=is_value, other=0.0)
        y = tl.dot(x.to(tl.float32), matrix, y, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    at = y_ptr + row[:, None] * D + cols[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & (cols < D)[None, :])


@functools.cache
def rotation(D: int, device: torch.device) -> Tensor:
    """Return the matrix by which D values are rotated, float32 [D, D]; it stays where it is."""
    with torch.inference_mode(False):
        return hadamard_reference(torch.eye(D, dtype=torch.float32)).to(device)


def launch_hadamard(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply x [M, D], its rows contiguous, with a matrix float32 [D, D]; [M, D] in ``dtype``."""
    M, D = x.shape
    y = torch.empty((M, D), dtype=dtype, device=x.device)
    config = tiles("hadamard_fwd", D, x.device)
    launch(_hadamard_fwd_kernel, (cdiv(M, config["BLOCK_M"]),))(
        x, matrix, y,
        x.stride(0),
        M,
        D=D, **config, **dependent(x.device),
    )  # fmt: skip
    return y
