"""Triton sums of neighbouring keys. One program makes one unit of one key head.

The last units of each row are made, as many as there are programs: after new tokens have been
stored, those that they may have completed. To make one again changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.top_blocks.units import Units
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _pool_keys_kernel(
    # tensors: k [B T Hk D]; out [B U Hk D], of bounds [B U Hk 2 D]
    k_ptr, out_ptr,
    # int32 [B] or None: the first valid column, one past the last one; int32 [U]: the first column
    # of the unit of each row, below 0 without one
    leftpad_ptr, used_ptr, columns_ptr,
    # strides, in elements
    k_stride_b, k_stride_t, k_stride_h, out_stride_b, out_stride_u, out_stride_h,
    # sizes
    T, U,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr, STRIDE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    unit = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    if columns_ptr is not None:
        start = tl.load(columns_ptr + unit)
    else:
        n, first = T, b * 0
        if used_ptr is not None:
            n = tl.minimum(tl.load(used_ptr + b), T)
        if leftpad_ptr is not None:
            first = tl.load(leftpad_ptr + b)
        whole = n - first - WINDOW
        # rounded down, of what may be below 0
        last = tl.where(whole >= 0, whole // STRIDE, -1)
        start = tl.where(last >= unit, first + (last - unit) * STRIDE, -1)
        unit = first // STRIDE + last - unit
    if (start >= 0) & (unit < U):
        k_ptr += batch * k_stride_b + start.to(tl.int64) * k_stride_t + head * k_stride_h
        out_ptr += batch * out_stride_b + unit.to(tl.int64) * out_stride_u + head * out_stride_h
        w = tl.arange(0, BLOCK_W)
        dims = tl.arange(0, BLOCK_D)
        is_key = w < WINDOW
        k = load_rows(k_ptr, w, k_stride_t, is_key, D, BLOCK_D).to(tl.float32)  # [BLOCK_W, BLOCK_D]
        if BOUNDS:
            most = tl.max(tl.where(is_key[:, None], k, float("-inf")), axis=0)
            least = tl.min(tl.where(is_key[:, None], k, float("inf")), axis=0)
            tl.store(out_ptr + dims, most.to(out_ptr.dtype.element_ty), mask=dims < D)
            tl.store(out_ptr + D + dims, least.to(out_ptr.dtype.element_ty), mask=dims < D)
        else:
            mean = tl.sum(k, axis=0) / WINDOW
            tl.store(out_ptr + dims, mean.to(out_ptr.dtype.element_ty), mask=dims < D)


def launch_pool_keys(
    k: Tensor,
    out: Tensor,
    *,
    units: Units,
    last: int,
    leftpad: Tensor | None = None,
    used: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Write the last units of each row of k [B T Hk D] into out [B U Hk D or 2 D], by one launch.

    Args:
        k: the first ``used`` columns count.
        out: stored as ``Units`` says; other rows stay as they are.
        units: what to make.
        last: how many units of each row.
        leftpad: int32 [B]; None: nothing is padding.
        used: int32 [B]; None: all columns.
        columns: int32 [U], the first column of each unit, below 0 for none; in place of the others.
    """
    (B, T, Hk, D), U = k.shape, out.shape[1]
    launch(_pool_keys_kernel, (last, Hk, B))(
        k, out, leftpad, used, columns, *k.stride()[:3], *out.stride()[:3], T, U,
        D=D, BOUNDS=units.kind == "bounds", STRIDE=units.stride, WINDOW=units.window,
        BLOCK_W=triton.next_power_of_2(units.window),
        **tiles("pool_keys", D, k.device), **dependent(k.device),
    )  # fmt: skip


def unit_columns(units: Units, tokens: int, starts: Tensor) -> Tensor:
    """Return the first column of the unit in each row, int32 [U], -1 for none.

    Args:
        units: what is made.
        tokens: of all sequences.
        starts: int32 [B + 1], ``cu_seqlens``.
    """
    row = torch.arange(units.rows(tokens), dtype=torch.int32, device=starts.device)
    first = torch.div(starts, units.stride, rounding_mode="floor").int()
    # of sequences that begin in one row the last: those before it are shorter than a unit
    b = torch.searchsorted(first[:-1].contiguous(), row, right=True).long() - 1
    column = starts[b] + (row - first[b]) * units.stride
    return torch.where(column + units.window <= starts[b + 1], column, -1).int()
