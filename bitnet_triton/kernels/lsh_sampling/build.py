"""Triton sort of codes into tables: one program counts, sums up and scatters one table of a head.

No atomics: within a tile of rows each finds its place by comparing pairs, so rows of a bucket stay
in their order and equal codes give equal tables on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _codes_of_tile(
    codes_ptr, i, n, first, codes_stride_t, BITS: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple:
    """Return the codes of rows i .., which exist, how many equal ones stand before each and
    whether none comes after; padding has a code of its own.
    """  # noqa: D205 - four values take two lines
    rows = i + tl.arange(0, BLOCK_N)
    exists = rows < n
    codes = tl.load(codes_ptr + rows.to(tl.int64) * codes_stride_t, mask=exists, other=0)
    codes = codes.to(tl.int32) & 0xFFFF
    codes = tl.where(rows < first, 1 << BITS, codes)
    codes = tl.where(exists, codes, -1)
    lanes = tl.arange(0, BLOCK_N)
    same = codes[:, None] == codes[None, :]
    before = tl.sum((same & (lanes[None, :] < lanes[:, None])).to(tl.int32), axis=1)
    after = tl.sum((same & (lanes[None, :] > lanes[:, None])).to(tl.int32), axis=1)
    return codes, exists, before, exists & (after == 0), rows


@triton.jit
def _lsh_build_kernel(
    # tensors: codes int16 [B Hk L n]; ids uint16 [B Hk L n]; offsets int32 [B Hk L W]; next int32
    # [B Hk L W + 1], which nobody reads; W is 2**K + 1
    codes_ptr, ids_ptr, offsets_ptr, next_ptr,
    # int32 [B] or None: the first row that is no padding
    leftpad_ptr,
    # strides, in elements
    codes_stride_b, codes_stride_h, codes_stride_l, codes_stride_t,
    ids_stride_b, ids_stride_h, ids_stride_l, offsets_stride_b, offsets_stride_h, offsets_stride_l,
    # sizes: the first of the n rows is ``start``
    n, start,
    # compile-time
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = (1 << BITS) + 1
    table = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    first = 0
    if leftpad_ptr is not None:
        first = tl.load(leftpad_ptr + b) - start
    codes_ptr += batch * codes_stride_b + head * codes_stride_h + table * codes_stride_l
    ids_ptr += batch * ids_stride_b + head * ids_stride_h + table * ids_stride_l
    offsets_ptr += batch * offsets_stride_b + head * offsets_stride_h + table * offsets_stride_l
    next_ptr += ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + table) * (W + 1)
    places = tl.arange(0, BLOCK_W)

    for i in range(0, W, BLOCK_W):
        tl.store(next_ptr + i + places, 0, mask=i + places < W)
    tl.debug_barrier()
    for i in range(0, n, BLOCK_N):
        codes, exists, before, is_last, _ = _codes_of_tile(
            codes_ptr, i, n, first, codes_stride_t, BITS, BLOCK_N
        )
        count = tl.load(next_ptr + codes, mask=exists, other=0)
        tl.store(next_ptr + codes, count + before + 1, mask=is_last)
        tl.debug_barrier()

    total = 0
    for i in range(0, W, BLOCK_W):
        exists = i + places < W
        count = tl.load(next_ptr + i + places, mask=exists, other=0)
        begin = total + tl.cumsum(count, 0) - count
        tl.store(offsets_ptr + i + places, begin, mask=exists)
        tl.store(next_ptr + i + places, begin, mask=exists)
        total += tl.sum(count, axis=0)
    tl.debug_barrier()

    for i in range(0, n, BLOCK_N):
        codes, exists, before, is_last, rows = _codes_of_tile(
            codes_ptr, i, n, first, codes_stride_t, BITS, BLOCK_N
        )
        at = tl.load(next_ptr + codes, mask=exists, other=0) + before
        tl.store(ids_ptr + at, rows.to(tl.uint16), mask=exists)
        tl.debug_barrier()
        tl.store(next_ptr + codes, at + 1, mask=is_last)
        tl.debug_barrier()


def launch_build(
    codes: Tensor, bits: int, start: int, leftpad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sort codes [B Hk L n] of rows from ``start`` on, at most 65536.

    Returns:
        ids uint16 [B Hk L n], counted from ``start``, and offsets int32 [B Hk L 2**K + 1]: the rows
        of code c stand at ``offsets[c]`` up to ``offsets[c + 1]``, padding behind all of them.
    """
    B, Hk, L, n = codes.shape
    width = (1 << bits) + 1
    ids = torch.empty((B, Hk, L, n), dtype=torch.uint16, device=codes.device)
    offsets = torch.empty((B, Hk, L, width), dtype=torch.int32, device=codes.device)
    cursor = torch.empty((B, Hk, L, width + 1), dtype=torch.int32, device=codes.device)
    launch(_lsh_build_kernel, (L, Hk, B))(
        codes, ids, offsets, cursor, leftpad,
        *codes.stride(), *ids.stride()[:3], *offsets.stride()[:3],
        n, start, BITS=bits, **tiles("lsh_build", n, codes.device),
    )  # fmt: skip
    return ids, offsets
