"""Pieces of the kernels over buckets: a tile of the order, and pairs that a round has to itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def open_tile(order_ptr, T, BLOCK: tl.constexpr) -> tuple:
    """Return the tokens of this program's tile, and which of them exist."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(order_ptr + place, mask=place < T, other=0), place < T


@triton.jit
def seen_places(low_ptr, high_ptr, i, exists, T) -> tuple:
    """Return which tokens are no padding, the first and last place that they see, and those of all.

    What padding holds is not read: it may be anything, and 0 * NaN would leak into sums.
    """
    low = tl.load(low_ptr + i, mask=exists, other=T)
    high = tl.load(high_ptr + i, mask=exists, other=-1)
    is_token = exists & (low < T) & (high >= 0)
    low = tl.where(is_token, low, T)
    high = tl.where(is_token, high, -1)
    return is_token, low, high, tl.min(low, 0), tl.max(high, 0) + 1


@triton.jit
def not_found_before(
    visible, rank_ptr, low_ptr, high_ptr, of_round, i, is_row, j, is_key, at_round
) -> tl.tensor:
    """Take out pairs [M, N] that an earlier round has found, j between ``low`` and ``high`` of i.

    All pointers stand at token 0 of the head in round 0.
    """
    for at in range(0, at_round, of_round):
        rank = tl.load(rank_ptr + at + j, mask=is_key, other=0)
        low = tl.load(low_ptr + at + i, mask=is_row, other=0)
        high = tl.load(high_ptr + at + i, mask=is_row, other=-1)
        found = (rank[None, :] >= low[:, None]) & (rank[None, :] <= high[:, None])
        visible = visible & (found == 0)
    return visible
