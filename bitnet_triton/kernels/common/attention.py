"""Pieces of attention kernels: where a tile lies, which keys a row sees, the running softmax.

A launch covers one band of the mask (``flash_attention/bands.py``). Positions p and j count from
the first valid key; query i stands at p = i + offset. In a class of positions that are equal modulo
``step``, R and s number the rows and the keys: p = c + step R and j = c + step s with the same
0 <= c < step. Row R sees one interval of s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# how a launch numbers the keys, as in flash_attention/bands.py
CLASS = tl.constexpr(0)
BEFORE = tl.constexpr(1)
AFTER = tl.constexpr(2)

# columns of the table of lengths
ROWS = tl.constexpr(1)
KEYS = tl.constexpr(3)


@triton.jit
def floor_div(a, b) -> tl.tensor:
    """Divide, rounding down; b is positive."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def ceil_div(a, b) -> tl.tensor:
    """Divide, rounding up; b is positive."""
    return floor_div(a + b - 1, b)


@triton.jit
def list_range(list_ptr, b, B) -> tuple:
    """Return where the tokens of a sequence stand in a list, and how many they are.

    A list starts with where each sequence starts among its tokens, and their number; B counts the
    packed sequences, None: there is one for each program in the third dimension of the grid.
    """
    sequences = B
    if B is None:
        sequences = tl.num_programs(2)
    start = tl.load(list_ptr + b)
    return sequences + 1 + start, tl.load(list_ptr + b + 1) - start


@triton.jit
def _count_tiles(
    lengths_ptr, list_ptr, b, T, step, COLUMN: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    if list_ptr is not None:
        return tl.cdiv(tl.load(list_ptr + b + 1) - tl.load(list_ptr + b), BLOCK)
    else:
        if lengths_ptr is not None:
            T = tl.load(lengths_ptr + 4 * b + COLUMN)
        return step * tl.cdiv(tl.cdiv(T, step), BLOCK)


@triton.jit
def _first_tile(
    lengths_ptr, list_ptr, b, step, COLUMN: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return where the tiles of a packed sequence begin: as if each before it wasted ``step``."""
    if list_ptr is not None:
        return tl.load(list_ptr + b) // BLOCK + b
    else:
        return tl.load(lengths_ptr + 4 * b + COLUMN - 1) // BLOCK + b * step


@triton.jit
def find_tile(
    lengths_ptr, list_ptr, B, T, step, COLUMN: tl.constexpr, BLOCK: tl.constexpr
) -> tuple:
    """Return the sequence of this program, its tile in it, and the tiles that the sequence has.

    Tiles are those of a list where ``list_ptr`` is given, else those of all classes. Those of B
    packed sequences stand behind one another in one dimension of the grid, with a few programs
    between them that get a tile which their sequence does not have. B is None where nothing is
    packed.
    """
    tile = tl.program_id(0)
    if B is None:
        b = tl.program_id(2)
    else:
        # there may be as many sequences as tokens, most of them empty: halve, do not count
        b = tile * 0
        end = b + B
        while end - b > 1:
            middle = (b + end) // 2
            first = _first_tile(lengths_ptr, list_ptr, middle, step, COLUMN, BLOCK)
            b = tl.where(first <= tile, middle, b)
            end = tl.where(first <= tile, end, middle)
        tile -= _first_tile(lengths_ptr, list_ptr, b, step, COLUMN, BLOCK)
    return b, tile, _count_tiles(lengths_ptr, list_ptr, b, T, step, COLUMN, BLOCK)


@triton.jit
def head_band(heads_ptr, head) -> tuple:
    """Return step, left, right and dilation of a query head, as ``Band.heads`` has them."""
    at = heads_ptr + 4 * head
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def sequence_lengths(lengths_ptr, b, Tq, Tk) -> tuple:
    """Return the first and the number of the valid rows of queries, and those of keys."""
    if lengths_ptr is None:
        return 0, Tq, 0, Tk
    else:
        at = lengths_ptr + 4 * b
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def row_class(i0, offset, step, DILATED: tl.constexpr) -> tuple:
    """Return the remainder c of the class of row i0, and the R of that row."""
    if DILATED:
        R = floor_div(i0 + offset, step)
        return i0 + offset - step * R, R
    else:
        return 0, offset


@triton.jit
def find_rows(
    list_ptr, b, B, tile, n_rows, offset, step, DILATED: tl.constexpr, BLOCK: tl.constexpr
) -> tuple:
    """Return the rows i of a tile, their numbers R, the remainder c of their class, which of them
    exist, and the R of the first and of the last one.
    """  # noqa: D205 - six values take two lines
    lanes = tl.arange(0, BLOCK)
    if list_ptr is not None:
        start, n = list_range(list_ptr, b, B)
        at = start + tile * BLOCK
        is_row = tile * BLOCK + lanes < n
        i = tl.load(list_ptr + at + lanes, mask=is_row, other=0)
        first = tl.load(list_ptr + at) + offset
        last = tl.load(list_ptr + tl.minimum(at + BLOCK, start + n) - 1) + offset
        return i, i + offset, 0, is_row, first, last
    else:
        per_class = tl.cdiv(tl.cdiv(n_rows, step), BLOCK)
        i0 = tile // per_class if DILATED else 0
        r0 = (tile % per_class if DILATED else tile) * BLOCK
        c, R0 = row_class(i0, offset, step, DILATED)
        n = tl.cdiv(n_rows - i0, step) if DILATED else n_rows
        r = r0 + lanes
        i = i0 + step * r if DILATED else r
        return i, R0 + r, c, r < n, R0 + r0, R0 + tl.minimum(r0 + BLOCK, n) - 1


@triton.jit
def open_rows(
    lengths_ptr, rows_ptr, row_flags_ptr, b, tile, B, Tq, Tk, step,
    DILATED: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return what a program knows of its tile of queries.

    Their places among the rows of q, their positions p and numbers R, which of them the launch
    computes, the R of the first and the last one, the remainder c of their class; the first valid
    key and how many there are; and what strides of a batch count, for inputs and for results.
    """
    start_q, n_q, start_k, n_k = sequence_lengths(lengths_ptr, b, Tq, Tk)
    i, R, c, is_row, first, last = find_rows(
        rows_ptr, b, B, tile, n_q, n_k - n_q, step, DILATED, BLOCK
    )
    batch = b.to(tl.int64)
    flat = batch * 0 if B is not None else batch
    rows = start_q + i
    if row_flags_ptr is not None:
        # those that see everything have a launch of their own
        flags = tl.load(row_flags_ptr + flat * Tq + rows, mask=is_row, other=1)
        is_row = is_row & (flags == 0)
    return rows, i + (n_k - n_q), R, is_row, first, last, c, start_k, n_k, batch, flat


@triton.jit
def summaries_before(x, block, summary) -> tl.tensor:
    """Count the summary keys in front of position x."""
    x = tl.maximum(x, 0)
    return (x // block) * summary + tl.maximum(x % block - (block - summary), 0)


@triton.jit
def row_bounds(R, c, step, left, right, n, block, summary, sinks, KIND: tl.constexpr) -> tuple:
    """Return the first of the n keys that rows see and the one behind the last; both grow with R.

    block is None without blocks, sinks without sinks.
    """
    if KIND == CLASS:
        low = tl.maximum(R - left, 0)
        high = tl.minimum(R + right + 1, n)
        if block is not None:
            start = floor_div(c + step * R, block) * block - c
            low = tl.maximum(low, ceil_div(start, step))
            high = tl.minimum(high, ceil_div(start + block, step))
        if sinks is not None:
            low = tl.maximum(low, ceil_div(sinks - c, step))
    else:
        low = summaries_before(R - left, block, summary)
        high = tl.minimum(summaries_before(R + right + 1, block, summary), n)
        own = floor_div(R, block) * summary
        if KIND == BEFORE:
            high = tl.minimum(high, own)
        else:
            low = tl.maximum(low, own + summary)
        if sinks is not None:
            low = tl.maximum(low, summaries_before(sinks, block, summary))
    return low, high


@triton.jit
def key_positions(
    s, c, step, block, summary, KIND: tl.constexpr, DILATED: tl.constexpr
) -> tl.tensor:
    """Return the positions of keys by their numbers."""
    if KIND != CLASS:
        return (s // summary) * block + block - summary + s % summary
    elif DILATED:
        return c + step * s
    else:
        return s


@triton.jit
def count_keys(
    n_keys, c, step, block, summary, KIND: tl.constexpr, DILATED: tl.constexpr
) -> tl.tensor:
    """Return how many of the first ``n_keys`` keys have a number."""
    if KIND != CLASS:
        return summaries_before(n_keys, block, summary)
    elif DILATED:
        return ceil_div(n_keys - c, step)
    else:
        return n_keys


@triton.jit
def split_tiles(low0, low1, high0, high1, BLOCK: tl.constexpr) -> tuple:
    """Count the tiles of keys that cross the left edge, that every row sees whole, and the rest.

    low0 and high0 are the bounds of the first row, low1 and high1 those of the last one; tiles
    start at low0.
    """
    tiles = tl.maximum(tl.cdiv(high1 - low0, BLOCK), 0)
    left = tl.minimum(tl.cdiv(low1 - low0, BLOCK), tiles)
    whole = tl.maximum(high0 - low0 - left * BLOCK, 0) // BLOCK
    whole = tl.minimum(whole, tiles - left)
    return left, whole, tiles - left - whole


@triton.jit
def seen_keys(
    R, is_row, first, last, c, step, left, right, n_keys, block, summary, sinks,
    KIND: tl.constexpr, DILATED: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return which keys a tile of rows sees.

    How many keys have a number, the first one that each row sees and the one behind the last, where
    the tiles start, and how many of them cross the left edge, are whole, and are the rest.
    """
    n = count_keys(n_keys, c, step, block, summary, KIND, DILATED)
    low, high = row_bounds(R, c, step, left, right, n, block, summary, sinks, KIND)
    low0, high0 = row_bounds(first, c, step, left, right, n, block, summary, sinks, KIND)
    low1, high1 = row_bounds(last, c, step, left, right, n, block, summary, sinks, KIND)
    # a tile of rows that all belong to another launch has nothing to see
    high1 = tl.where(tl.max(is_row.to(tl.int32), 0) > 0, high1, low0)
    edges, whole, more = split_tiles(low0, low1, high0, high1, BLOCK)
    return n, low, high, low0, edges, whole, more


@triton.jit
def listed_keys(keys_ptr, b, B, p, is_row, CAUSAL: tl.constexpr, BLOCK: tl.constexpr) -> tuple:
    """Return where a list of keys stands that everybody sees, and how many a tile of rows does."""
    start, listed = list_range(keys_ptr, b, B)
    if CAUSAL:
        last_p = tl.max(tl.where(is_row, p, -1), 0)
        listed = count_up_to(keys_ptr, start, listed, last_p, BLOCK)
    return start, listed


@triton.jit
def listed_tile(keys_ptr, start, t, listed, p, CAUSAL: tl.constexpr, BLOCK: tl.constexpr) -> tuple:
    """Return the positions of the listed keys from number t on, which exist, and which are seen."""
    at = t + tl.arange(0, BLOCK)
    j = tl.load(keys_ptr + start + at, mask=at < listed, other=0)
    visible = (at < listed)[None, :]
    if CAUSAL:
        visible = visible & (j[None, :] <= p[:, None])
    return j, at < listed, visible


@triton.jit
def load_rows(ptr, rows, stride, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """Load [rows, BLOCK_D], zeros from D on and where ``is_row`` is False; None: all exist."""
    dims = tl.arange(0, BLOCK_D)
    # int64: row * stride overflows int32 from 2**31 elements on
    return _load_tile(ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :], is_row, dims, D)


@triton.jit
def load_run(
    ptr, first, lanes, stride, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Load the rows first + lanes as ``load_rows`` does, with offsets of 32 bits from the first.

    A thread adds one number to offsets that it keeps, in half of the registers.
    """
    dims = tl.arange(0, BLOCK_D)
    offsets = lanes[:, None] * stride + dims[None, :]
    return _load_tile(ptr + first.to(tl.int64) * stride + offsets, is_row, dims, D)


@triton.jit
def _load_tile(at, is_row, dims, D: tl.constexpr) -> tl.tensor:
    if is_row is None:
        if dims.shape[0] == D:
            return tl.load(at)
        else:
            return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    elif dims.shape[0] == D:
        return tl.load(at, mask=is_row[:, None], other=0.0)
    else:
        return tl.load(at, mask=is_row[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def load_keys(
    ptr, first, lanes, j, stride, is_key, D: tl.constexpr, BLOCK_D: tl.constexpr,
    KIND: tl.constexpr, DILATED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load the keys at positions j, as ``load_rows`` does; without classes j is first + lanes."""
    if KIND == CLASS and not DILATED:
        return load_run(ptr, first, lanes, stride, is_key, D, BLOCK_D)
    else:
        return load_rows(ptr, j, stride, is_key, D, BLOCK_D)


@triton.jit
def store_rows(ptr, rows, stride, values, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr) -> None:
    """Store [rows, BLOCK_D], up to D, where ``is_row``."""
    dims = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = is_row[:, None] & (dims < D)[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def raw_scores(q, k, scale_log2, softcap_log2) -> tuple:
    """Return scores [M, N], and the positive factor that puts them in base 2.

    To scale what the softmax subtracts takes no instruction more: one for each pair less.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if softcap_log2 is None:
        return scores, scale_log2
    else:
        return libdevice.tanh(scores * scale_log2), softcap_log2


@triton.jit
def score_tile(q, k, scale_log2, softcap_log2) -> tuple:
    """Return scores in base 2 [M, N], and the slope of their cap.

    With a cap c, ``scale_log2`` is scale / c and ``softcap_log2`` is c log2(e), else None.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [M, N]
    if softcap_log2 is None:
        return scores, 1.0
    else:
        capped = libdevice.tanh(scores)
        return capped * softcap_log2, 1.0 - capped * capped


@triton.jit
def softmax_step(top, total, scores, factor) -> tuple:
    """Take a tile of scores, in base 2 times a positive factor, into the running softmax
    (arXiv:1805.02867).

    Returns the weights of the tile, by how much what was summed before shrinks, the new maximum of
    the scores and the new sum of weights.
    """  # noqa: D205 - what scores are takes two lines
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key keeps a finite pivot: -inf - -inf is NaN
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * factor
    weights = tl.exp2(scores * factor - pivot[:, None])
    shrink = tl.exp2(top * factor - pivot)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def accumulate(acc, top, total, scores, factor, v) -> tuple:
    """Add a tile of keys to what a tile of rows has summed."""
    weights, shrink, top, total = softmax_step(top, total, scores, factor)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, top, total


@triton.jit
def visible_tile(
    s, low, high, p, j, dilation, flags_ptr, is_key, KIND: tl.constexpr, DILATED: tl.constexpr
) -> tl.tensor:
    """Return which pairs [M, N] are visible; flagged keys are somebody else's."""
    visible = (s[None, :] >= low[:, None]) & (s[None, :] < high[:, None])
    if KIND != CLASS and DILATED:
        visible = visible & ((p[:, None] - j[None, :]) % dilation == 0)
    if flags_ptr is not None:
        flags = tl.load(flags_ptr + j, mask=is_key, other=1)
        visible = visible & (flags == 0)[None, :]
    return visible


@triton.jit
def count_up_to(list_ptr, start, n, last, BLOCK: tl.constexpr) -> tl.tensor:
    """Count the tokens of a sorted list that stand at position ``last`` or before."""
    count = n * 0
    for t in range(0, n, BLOCK):
        at = t + tl.arange(0, BLOCK)
        token = tl.load(list_ptr + start + at, mask=at < n, other=0)
        count += tl.sum(((at < n) & (token <= last)).to(tl.int32), axis=0)
    return count


@triton.jit
def column_bounds(
    s, j, c, step, left, right, block, KIND: tl.constexpr, LISTED: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return the first row R that sees keys and the one behind the last; both grow with s.

    ``row_bounds`` the other way round; listed keys are seen by every row, save for causality.
    """
    if LISTED:
        return j if CAUSAL else j * 0 - (1 << 30), j * 0 + (1 << 30)
    elif KIND == CLASS:
        low = s - right
        high = s + left + 1
        if block is not None:
            start = floor_div(j, block) * block - c
            low = tl.maximum(low, ceil_div(start, step))
            high = tl.minimum(high, ceil_div(start + block, step))
        return low, high
    elif KIND == BEFORE:
        return tl.maximum(j - right, (j // block + 1) * block), j + left + 1
    else:
        return j - right, tl.minimum(j + left + 1, j // block * block)
