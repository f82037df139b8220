"""Pieces that the kernels of linear attention share: where a chunk lies, and decays between tokens.

A chunk has up to BLOCK_T tokens of one sequence. Everything is computed in float32. g is the sum of
``log_decay`` from the first token of the chunk on: between b and a lies a decay of exp(g_a - g_b).
"""

from __future__ import annotations

import triton
import triton.language as tl

# what a decay belongs to
NONE = tl.constexpr(0)
HEADS = tl.constexpr(1)
CHANNELS = tl.constexpr(2)


@triton.jit
def open_chunk(chunks_ptr, c, T, n, BLOCK_T: tl.constexpr) -> tuple:
    """Return the batch of a chunk, its first token there, and the number of its tokens.

    There are n chunks of T tokens in each batch, or a list of them: int32 [chunks 2], first and
    number.
    """
    if chunks_ptr is None:
        b = c // n
        first = (c - b * n) * BLOCK_T
        count = tl.minimum(T - first, BLOCK_T)
    else:
        b = c * 0
        first = tl.load(chunks_ptr + 2 * c)
        count = tl.load(chunks_ptr + 2 * c + 1)
    return b.to(tl.int64), first.to(tl.int64), count


@triton.jit
def chunk_range(starts_ptr, b, n) -> tuple:
    """Return the first chunk of a sequence and the one behind its last."""
    if starts_ptr is None:
        return b * n, b * n + n
    else:
        return tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1)


@triton.jit
def load_tile(ptr, rows, stride, is_row, first, D: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Load the columns first .. first + BLOCK of rows in float32, zeros outside of [rows D].

    Offsets from ``ptr`` have 32 bits: those of 64 would take half of the registers.
    """
    cols = first + tl.arange(0, BLOCK)
    mask = is_row[:, None] & (cols < D)[None, :]
    at = ptr + (rows[:, None] * stride + cols[None, :])
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    ptr, rows, stride, values, is_row, first, D: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Store what ``load_tile`` loads."""
    cols = first + tl.arange(0, BLOCK)
    mask = is_row[:, None] & (cols < D)[None, :]
    at = ptr + (rows[:, None] * stride + cols[None, :])
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_state(
    ptr, edge_ptr, is_inside, state, dims, first, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Store rows of a state beside the chunk that it belongs to, or at the edge of a sequence."""
    is_dim = dims < D
    store_tile(ptr, dims, DV, state, is_dim & is_inside, first, DV, BLOCK_V)
    if edge_ptr is not None:
        store_tile(edge_ptr, dims, DV, state, is_dim & (is_inside == 0), first, DV, BLOCK_V)


@triton.jit
def load_sums(
    g_ptr, flat, lanes, is_row, head, Hk, first, D: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load the sums g of the rows flat + lanes: [rows 1], of channels some columns [rows BLOCK]."""
    if DECAY == NONE:
        return tl.zeros((lanes.shape[0], 1), tl.float32)
    elif DECAY == HEADS:
        at = g_ptr + (flat * Hk + head)
        return tl.load(at + lanes * Hk, mask=is_row, other=0.0)[:, None]
    else:
        return load_tile(g_ptr + (flat * Hk + head) * D, lanes, Hk * D, is_row, first, D, BLOCK)


@triton.jit
def load_whole(
    g_ptr, row, head, Hk, first, D: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr
) -> tl.tensor:
    """Load the sum g of one row: [1], of channels [BLOCK]."""
    if DECAY == NONE:
        return tl.zeros((1,), tl.float32)
    elif DECAY == HEADS:
        return tl.load(g_ptr + row * Hk + head + tl.arange(0, 1))
    else:
        cols = first + tl.arange(0, BLOCK)
        return tl.load(g_ptr + (row * Hk + head) * D + cols, mask=cols < D, other=0.0)


@triton.jit
def pair_decay(g, is_seen, DECAY: tl.constexpr) -> tl.tensor:
    """Return exp(g_a - g_b) where ``is_seen`` [a b], else 0, of decays of heads g [rows 1]."""
    if DECAY == NONE:
        return tl.where(is_seen, 1.0, 0.0)
    else:
        # masked before exp: what is not seen would overflow
        return tl.exp(tl.where(is_seen, g - tl.trans(g), float("-inf")))


@triton.jit
def level_decay(
    g_ptr, g, flat, count, level, head, Hk, first, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return decays of channels [BLOCK_T BLOCK] from and to the token in the middle of two blocks.

    Tokens a > b whose numbers part at bit ``level`` lie in neighbouring blocks of 2**level, with
    the last token m of b's block between them: the decay is exp(g_a - g_m) exp(g_m - g_b), and
    neither factor overflows.
    """
    lanes = tl.arange(0, BLOCK_T)
    size = 1 << level
    middle = lanes // (2 * size) * (2 * size) + size - 1
    middle = tl.minimum(middle, count - 1)
    at = g_ptr + (flat * Hk + head) * D
    between = load_tile(at, middle, Hk * D, lanes < BLOCK_T, first, D, BLOCK)
    return tl.exp(tl.minimum(g - between, 0.0)), tl.exp(tl.minimum(between - g, 0.0))


@triton.jit
def of_level(level, BLOCK_T: tl.constexpr) -> tl.tensor:
    """Return which pairs [a b], a > b, ``level_decay`` serves."""
    a = tl.arange(0, BLOCK_T)[:, None]
    b = tl.arange(0, BLOCK_T)[None, :]
    return (((a ^ b) >> level) == 1) & (a > b)


@triton.jit
def load_square(ptr, at, BLOCK_T: tl.constexpr) -> tl.tensor:
    """Load the matrix [BLOCK_T BLOCK_T] number ``at``."""
    a = tl.arange(0, BLOCK_T)
    return tl.load(ptr + at * BLOCK_T * BLOCK_T + (a[:, None] * BLOCK_T + a[None, :]))


@triton.jit
def store_square(ptr, at, values, BLOCK_T: tl.constexpr) -> None:
    """Store the matrix [BLOCK_T BLOCK_T] number ``at``."""
    a = tl.arange(0, BLOCK_T)
    tl.store(ptr + at * BLOCK_T * BLOCK_T + (a[:, None] * BLOCK_T + a[None, :]), values)
