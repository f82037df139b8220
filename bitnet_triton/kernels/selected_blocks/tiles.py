"""Pieces of the kernels over chosen blocks: where a query stands, and which keys its list names."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_place(starts_ptr, ends_ptr, b, t, Tq, Tk, PACKED: tl.constexpr) -> tuple:
    """Return the first valid key of query t, one past the last one, and where the query stands.

    Packed sequences are one row whose queries are its keys; each query has bounds of its own.
    """
    at = t if PACKED else b
    start = 0 * t
    end = Tk + 0 * t
    if starts_ptr is not None:
        start = tl.load(starts_ptr + at)
    if ends_ptr is not None:
        end = tl.minimum(tl.load(ends_ptr + at), Tk)
    return start, end, t if PACKED else end - Tq + t


@triton.jit
def listed_keys(
    list_ptr, listed, lanes, s, ahead, start, end, p, block,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return a tile of the keys of entry s of a list, from ``ahead`` keys on, and which are seen.

    ``listed`` [BLOCK_S] is the whole list: an entry counts where its number stands first.
    """
    n = tl.load(list_ptr + s)
    earlier = tl.sum(((listed == n) & (lanes < s)).to(tl.int32), 0)
    # n * block overflows for numbers behind the last block
    is_block = (n >= 0) & (n < tl.cdiv(end - start, block)) & (earlier == 0) & (p >= start)
    first = start + tl.where(is_block, n, 0) * block
    stop = tl.minimum(first + block, end)
    if CAUSAL:
        stop = tl.minimum(stop, p + 1)
    j = first + ahead + tl.arange(0, BLOCK_N)
    return j, (j < stop) & is_block


@triton.jit
def open_group(first, groups, Hk, Tq, chunk) -> tuple:
    """Return which group of tokens a program has, its row and key head, and its tokens' range."""
    number = tl.program_id(0).to(tl.int64) + first
    row = number // groups
    t0 = number % groups * chunk
    return number, row // Hk, row % Hk, t0, tl.minimum(t0 + chunk, Tq)


@triton.jit
def open_block(offsets_ptr, spans_ptr, number, batch, n, blocks) -> tuple:
    """Return where the list of a block stands, its first key and one past its last."""
    at = offsets_ptr + number * blocks + n
    span = spans_ptr + 2 * (batch * blocks + n)
    return tl.load(at), tl.load(at + 1), tl.load(span), tl.load(span + 1)


@triton.jit
def row_tile(tokens_ptr, at, stop, GROUP: tl.constexpr, BLOCK_M: tl.constexpr) -> tuple:
    """Return the tokens of a tile of rows, which of its heads each row is, and which rows exist.

    All heads of a token stand behind one another; what remains of the tile is empty.
    """
    lanes = tl.arange(0, BLOCK_M)
    i = lanes // GROUP
    is_row = (i < BLOCK_M // GROUP) & (at + i < stop)
    return tl.load(tokens_ptr + at + i, mask=is_row, other=0), lanes % GROUP, is_row
