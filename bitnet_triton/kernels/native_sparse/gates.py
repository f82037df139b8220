"""Triton kernels of the gated sum. One program takes a tile of rows, a token and head each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, store_rows
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _gated_sum_fwd_kernel(
    # tensors: a, b, c, out [M D]; gates [M 3]
    a_ptr, b_ptr, c_ptr, gates_ptr, out_ptr,
    # sizes
    M,
    # compile-time
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < M
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        at = a_ptr if part == 0 else (b_ptr if part == 1 else c_ptr)
        gate = tl.load(gates_ptr + rows * 3 + part, mask=is_row, other=0.0).to(tl.float32)
        x = load_rows(at, rows, D, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        total += x.to(tl.float32) * gate[:, None]
    store_rows(out_ptr, rows, D, total, is_row, D, BLOCK_D)


@triton.jit
def _gated_sum_bwd_kernel(
    # tensors: dout, a, b, c, da, db, dc [M D]; gates, dgates [M 3]
    dout_ptr, a_ptr, b_ptr, c_ptr, gates_ptr, da_ptr, db_ptr, dc_ptr, dgates_ptr,
    # sizes
    M,
    # compile-time
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < M
    dout = load_rows(dout_ptr, rows, D, is_row, D, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    for part in tl.static_range(3):
        at = a_ptr if part == 0 else (b_ptr if part == 1 else c_ptr)
        to = da_ptr if part == 0 else (db_ptr if part == 1 else dc_ptr)
        gate = tl.load(gates_ptr + rows * 3 + part, mask=is_row, other=0.0).to(tl.float32)
        x = load_rows(at, rows, D, is_row, D, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        dgate = tl.sum(dout * x, axis=1).to(dgates_ptr.dtype.element_ty)
        tl.store(dgates_ptr + rows * 3 + part, dgate, mask=is_row)
        store_rows(to, rows, D, dout * gate[:, None], is_row, D, BLOCK_D)


def launch_gated_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    """Sum a, b and c [.. D], contiguous, by gates [.. 3]."""
    D = a.shape[-1]
    M, out = a.numel() // D, torch.empty_like(a)
    config = tiles("gated_sum_fwd", D, a.device)
    launch(_gated_sum_fwd_kernel, (cdiv(M, config["BLOCK_M"]),))(
        a, b, c, gates, out, M, D=D, **config
    )
    return out


def launch_gated_sum_bwd(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a, b, c and the gates."""
    D = a.shape[-1]
    M = a.numel() // D
    da, db, dc, dgates = (torch.empty_like(t) for t in (a, b, c, gates))
    config = tiles("gated_sum_bwd", D, a.device)
    launch(_gated_sum_bwd_kernel, (cdiv(M, config["BLOCK_M"]),))(
        dout, a, b, c, gates, da, db, dc, dgates, M, D=D, **config
    )
    return da, db, dc, dgates
