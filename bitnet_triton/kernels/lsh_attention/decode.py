"""Triton step of bucket_attention for the latest token of each row: its bucket, a list, attention.

One program takes one head. The list goes back from the latest token, and ends where every round has
as many of its bucket as it looks back to: how long a step takes depends on the window and on the
number of buckets, not on how many tokens there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.lsh_attention.arguments import Directions
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import head_size, tiles

_LOG2_E = 1.4426950408889634


@triton.jit
def _nearest(
    x, rows_ptr, width, SIGNED: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr
) -> tl.tensor:
    """Return the number of the direction that x [BLOCK_D] is most alike: the first of equals."""
    lanes = tl.arange(0, BLOCK_C)
    best = float("-inf") + 0.0 * tl.sum(x, axis=0)
    number = width * 0
    for c in range(0, width, BLOCK_C):
        is_row = c + lanes < width
        rows = load_rows(rows_ptr, c + lanes, D, is_row, D, x.shape[0])  # [BLOCK_C, BLOCK_D]
        along = tl.sum(rows.to(tl.float32) * x[None, :], axis=1)
        alike = tl.where(is_row, tl.abs(along) if SIGNED else along, float("-inf"))
        top = tl.max(alike, axis=0)
        first = tl.min(tl.where(is_row & (alike == top), c + lanes, width), axis=0)
        if SIGNED:
            turned = tl.sum(tl.where(c + lanes == first, along, 0.0), axis=0) < 0
            first += tl.where(turned, width, 0)
        number = tl.where(top > best, first, number)
        best = tl.maximum(top, best)
    return number


@triton.jit
def _lsh_attention_hash_kernel(
    # tensors: x [B T H D]; rows [heads or 1, R (W0 + W1), D]; numbers int32 [B H R T]
    x_ptr, rows_ptr, numbers_ptr,
    # int32 [B]: which token
    slots_ptr,
    # strides, in elements
    x_stride_b, x_stride_t, x_stride_h, rows_stride_h,
    numbers_stride_b, numbers_stride_h, numbers_stride_r,
    # sizes; W1 is 0 where one factor is all
    R, W0, W1,
    # compile-time
    DEPENDENT: tl.constexpr, SIGNED: tl.constexpr, TWO: tl.constexpr, D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    head, b = tl.program_id(0), tl.program_id(1)
    batch = b.to(tl.int64)
    slot = tl.load(slots_ptr + b).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    x_ptr += batch * x_stride_b + slot * x_stride_t + head * x_stride_h
    x = tl.load(x_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    rows_ptr += head.to(tl.int64) * rows_stride_h
    numbers_ptr += batch * numbers_stride_b + head * numbers_stride_h + slot
    for r in range(R):
        number = _nearest(x, rows_ptr, W0, SIGNED, D, BLOCK_C)
        if TWO:
            choices = 2 * W1 if SIGNED else W1
            number = number * choices + _nearest(x, rows_ptr + W0 * D, W1, SIGNED, D, BLOCK_C)
        tl.store(numbers_ptr + tl.cast(r, tl.int64) * numbers_stride_r, number)
        rows_ptr += (W0 + W1) * D


@triton.jit
def _lsh_attention_list_kernel(
    # tensors: numbers int32 [B H R T]; list [B H room] and counts [B H], int32
    numbers_ptr, list_ptr, counts_ptr,
    # int32 [B] or None: the first token that counts, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    numbers_stride_b, numbers_stride_h, numbers_stride_r,
    # sizes
    T, window, room,
    # compile-time
    DEPENDENT: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_R: tl.constexpr = triton.next_power_of_2(R)
    H, head, b = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    batch = b.to(tl.int64)
    end = T + 0 * b
    first = 0 * b
    if used_ptr is not None:
        end = tl.minimum(tl.load(used_ptr + b), T)
    if leftpad_ptr is not None:
        first = tl.load(leftpad_ptr + b)
    last = end - 1
    r = tl.arange(0, BLOCK_R)
    is_round = r < R
    numbers_ptr += batch * numbers_stride_b + head * numbers_stride_h
    at_round = r.to(tl.int64) * numbers_stride_r
    # no bucket has a number below 0
    own = tl.load(numbers_ptr + at_round + last, mask=is_round & (last >= first), other=-1)
    list_ptr += (batch * H + head) * room
    met = tl.where(is_round, 0, window)
    count = 0 * b
    lanes = tl.arange(0, BLOCK_N)
    while (end > first) & (tl.min(met, axis=0) < window):
        j = end - BLOCK_N + lanes
        is_token = j >= first
        numbers = tl.load(
            numbers_ptr + at_round[:, None] + j[None, :],
            mask=is_round[:, None] & is_token[None, :],
            other=-2,
        )  # [BLOCK_R, BLOCK_N]
        same = (numbers == own[:, None]).to(tl.int32)
        many = tl.sum(same, axis=1)
        # how many of the bucket there are from a token on
        behind = (met + many)[:, None] - tl.cumsum(same, axis=1) + same
        seen = tl.max(tl.where(behind <= window, same, 0), axis=0)
        new = tl.where(j < last, seen, 0)
        tl.store(list_ptr + count + tl.cumsum(new, axis=0) - new, j, mask=new > 0)
        count += tl.sum(new, axis=0)
        met += many
        end -= BLOCK_N
    # below 0: there is not even the token itself
    tl.store(counts_ptr + batch * H + head, tl.where(last >= first, count, -1))


@triton.jit
def _lsh_attention_decode_kernel(
    # tensors: qk [B T H D]; v [B T H DV]; out [B 1 H DV]; list [B H room], counts [B H]
    qk_ptr, v_ptr, out_ptr, list_ptr, counts_ptr,
    # int32 [B] or None: one past the last token
    used_ptr,
    # strides, in elements
    qk_stride_b, qk_stride_t, qk_stride_h, v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars
    T, room, scale_log2,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    H, head, b = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    batch = b.to(tl.int64)
    last = T - 1 + 0 * batch
    if used_ptr is not None:
        last = (tl.minimum(tl.load(used_ptr + b), T) - 1).to(tl.int64)
    of_list = batch * H + head
    count = tl.load(counts_ptr + of_list)
    list_ptr += of_list * room
    qk_ptr += batch * qk_stride_b + head * qk_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    dims, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    exists = count >= 0
    q = tl.load(qk_ptr + last * qk_stride_t + dims, mask=(dims < D) & exists, other=0.0)
    q = q.to(tl.float32)  # [BLOCK_D]
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    top = float("-inf") + 0.0 * tl.sum(q, axis=0)
    total = 0.0 * tl.sum(q, axis=0)
    lanes = tl.arange(0, BLOCK_N)
    for i in range(0, count, BLOCK_N):
        is_key = i + lanes < count
        j = tl.load(list_ptr + i + lanes, mask=is_key, other=0)
        k = load_rows(qk_ptr, j, qk_stride_t, is_key, D, BLOCK_D).to(tl.float32)
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV).to(tl.float32)
        squares = tl.sum(k * k, axis=1)
        inverse = tl.where(squares > 0, tl.rsqrt(tl.where(squares > 0, squares, 1.0)), 0.0)
        scores = tl.sum(k * q[None, :], axis=1) * inverse * scale_log2
        scores = tl.where(is_key, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        shrunk = tl.exp2(top - higher)
        total = total * shrunk + tl.sum(weights, axis=0)
        acc = acc * shrunk + tl.sum(weights[:, None] * v, axis=0)
        top = higher
    # a token that sees nothing else has itself
    own = tl.load(
        v_ptr + last * v_stride_t + columns, mask=(columns < DV) & (count == 0), other=0.0
    ).to(tl.float32)
    out = acc / tl.where(count > 0, total, 1.0) + own
    at = out_ptr + of_list * DV + columns
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=columns < DV)


def launch_hash_step(x: Tensor, directions: Directions, numbers: Tensor, slots: Tensor) -> None:
    """Write the buckets of one token a row, by launches alone.

    Args:
        x: [B T H D], last dimension contiguous.
        directions: of all rounds, contiguous.
        numbers: int32 [B H R T], last dimension contiguous.
        slots: int32 [B], which token it is.
    """
    (B, _, H, D), R = x.shape, numbers.shape[2]
    rows, (first, *others) = directions.rows, directions.widths
    launch(_lsh_attention_hash_kernel, (H, B))(
        x, rows, numbers, slots,
        *x.stride()[:3], rows.stride(0) if rows.shape[0] > 1 else 0, *numbers.stride()[:3],
        R, first, others[0] if others else 0,
        SIGNED=directions.is_signed, TWO=bool(others), D=D,
        **tiles("lsh_attention_hash", head_size(D, x.dtype), x.device), **dependent(x.device),
    )  # fmt: skip


def launch_bucket_step(
    qk: Tensor, v: Tensor, numbers: Tensor, *, window: int, scale: float,
    leftpad: Tensor | None = None, used: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what the last token of each row reads, [B 1 H Dv], by launches alone.

    Args:
        qk: [B T H D], last dimension contiguous.
        v: [B T H Dv], likewise.
        numbers: int32 [B H R T], likewise.
        window: tokens of a bucket, the last one included.
        scale: multiplies the scores.
        leftpad: int32 [B], the first token that counts.
        used: int32 [B], one past the last one.
    """
    (B, T, H, D), DV, R = qk.shape, v.shape[-1], numbers.shape[2]
    window = min(window, T)
    room = min(R * window, T)
    rows = torch.empty((B, H, room), dtype=torch.int32, device=qk.device)
    counts = torch.empty((B, H), dtype=torch.int32, device=qk.device)
    out = torch.empty((B, 1, H, DV), dtype=v.dtype, device=v.device)
    launch(_lsh_attention_list_kernel, (H, B))(
        numbers, rows, counts, leftpad, used,
        *numbers.stride()[:3], T, window, room,
        R=R, **tiles("lsh_attention_list", R, qk.device), **dependent(qk.device),
    )  # fmt: skip
    launch(_lsh_attention_decode_kernel, (H, B))(
        qk, v, out, rows, counts, used,
        *qk.stride()[:3], *v.stride()[:3], T, room, scale * _LOG2_E,
        D=D, DV=DV,
        **tiles("lsh_attention_decode", head_size(max(D, DV), qk.dtype), qk.device),
        **dependent(qk.device),
    )  # fmt: skip
    return out
