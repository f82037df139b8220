"""Triton numbers for the entries of lists, by which a sort turns them around."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.selected_blocks.tiles import query_place
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _selected_blocks_order_kernel(
    # tensors: indices [B Tq Hk S], of any strides; numbers int32 [B Tq Hk S]
    indices_ptr, numbers_ptr,
    # int32 [B], or [Tq] of packed sequences, or None: the first valid key, one past the last one,
    # the number of the first block
    starts_ptr, ends_ptr, bases_ptr,
    # strides, in elements
    indices_stride_b, indices_stride_t, indices_stride_h, indices_stride_s,
    # sizes: queries, keys, entries of a list, keys of a block, lists of a group, blocks of a row
    Tq, Tk, S, block, chunk, blocks,
    # compile-time
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Number what each entry of a list names: group of tokens, then block.

    What names no visible key, or a block that the list has before, gets a number behind all others.
    """
    head = tl.program_id(1)
    Hk = tl.num_programs(1)
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_t = t < Tq
    start, end, p = query_place(starts_ptr, ends_ptr, b, tl.minimum(t, Tq - 1), Tq, Tk, PACKED)
    s = tl.arange(0, BLOCK_S)
    is_entry = is_t[:, None] & (s < S)[None, :]
    at = indices_ptr + batch * indices_stride_b + head * indices_stride_h
    at += t.to(tl.int64) * indices_stride_t
    n = tl.load(at[:, None] + s[None, :] * indices_stride_s, mask=is_entry, other=-1)
    counts = (n >= 0) & (n < tl.cdiv(end - start, block)[:, None]) & (p >= start)[:, None]
    for i in range(S - 1):
        earlier = tl.load(at + i * indices_stride_s, mask=is_t, other=-1)
        counts = counts & ((n != earlier[:, None]) | (s <= i)[None, :])
    first = start[:, None] + tl.where(counts, n, 0) * block
    if CAUSAL:
        counts = counts & (first <= p[:, None])
    if bases_ptr is not None:
        n += tl.load(bases_ptr + t, mask=is_t, other=0)[:, None]
    groups = tl.cdiv(Tq, chunk)
    group = ((batch * Hk + head) * groups)[None, None] + (t // chunk)[:, None]
    number = tl.where(counts, group * blocks + n, tl.num_programs(2) * Hk * groups * blocks)
    row = (batch * Tq + t) * Hk + head
    tl.store(numbers_ptr + row[:, None] * S + s[None, :], number.to(tl.int32), mask=is_entry)


def launch_numbers(
    indices: Tensor, bounds: tuple[Tensor | None, Tensor | None, Tensor | None], *, Tk: int,
    block: int, chunk: int, blocks: int, causal: bool, packed: bool,
) -> Tensor:  # fmt: skip
    """Return int32 [B Tq Hk S]; ``bounds``: starts, ends and bases as the kernel takes them."""
    B, Tq, Hk, S = indices.shape
    numbers = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    BLOCK_S = triton.next_power_of_2(S)
    config = tiles("selected_blocks_order", BLOCK_S, indices.device)
    launch(_selected_blocks_order_kernel, (cdiv(Tq, config["BLOCK_T"]), Hk, B))(
        indices, numbers,
        *bounds,
        *indices.stride(),
        Tq, Tk, S, block, chunk, blocks,
        CAUSAL=causal, PACKED=packed, BLOCK_S=BLOCK_S, **config,
    )  # fmt: skip
    return numbers
