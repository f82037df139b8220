"""The order in which a selection takes pairs: by score, then earlier keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rank(scores) -> tl.tensor:
    """Return int32 in the order of scores; 0 and -0 are equal."""
    bits = scores.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores == 0, 0, rank)


@triton.jit
def order_keys(scores, j) -> tl.tensor:
    """Number pairs in the order in which a selection takes them: by score, then earlier keys.

    Returns int64, the greater the sooner: scores above, positions below.
    """
    return (_rank(scores).to(tl.int64) << 32) + (0x7FFFFFFF - j)


@triton.jit
def is_taken(scores, j, cut) -> tl.tensor:
    """Tell which pairs stand at the order ``cut`` or above it, without int64 for each pair."""
    rank = _rank(scores)
    cut_rank = (cut >> 32).to(tl.int32)
    last = 0x7FFFFFFF - (cut & 0x7FFFFFFF).to(tl.int32)
    return (rank > cut_rank) | ((rank == cut_rank) & (j <= last))
