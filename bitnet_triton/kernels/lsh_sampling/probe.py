"""Triton sample of a query: the rows that it meets in two tables or more.

One program takes one segment of the rows, or the tail behind all segments, for a few lists of rows:
of query heads, or of a group. In a segment it goes through one bucket of each table and counts how
often it meets a row; a row is listed when it is met for the second time. Buckets hold a row once,
so a tile of one bucket writes no counter twice, and lists come in the same order on every device.
Lists that follow each other in a program use the same counters, and clear none: each counts from
where the one before it ended. A CPU takes row after row: what a tile saves, the compaction of its
few new rows costs.
The tail is not sorted: its codes are compared.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _append(list_ptr, count, values, is_new) -> tl.tensor:
    """Write the values that are new behind those of a list; return how many it has then."""
    new = is_new.to(tl.int32)
    at = list_ptr + count + tl.cumsum(new, 0) - new
    tl.store(at, values.to(list_ptr.dtype.element_ty), mask=is_new)
    return count + tl.sum(new, axis=0)


@triton.jit
def _fetch_bucket(
    codes_ptr, ids_ptr, offsets_ptr, number, most, n, L, W,
    AHEAD: tl.constexpr, LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Ask for the first rows of the bucket of a code, and for where one further on starts.

    Behind the codes of a list come those of the next one, ``most`` in all. A load that is not used
    fetches, from any address.
    """
    later = tl.minimum(number + AHEAD, most - 1)
    code = tl.load(codes_ptr + later).to(tl.int32) & 0xFFFF
    table = tl.minimum(tl.where(later < L, later, later - L), L - 1)
    tl.load(offsets_ptr + table * W + code + tl.arange(0, 1), volatile=True)
    number = tl.minimum(number, most - 1)
    code = tl.load(codes_ptr + number).to(tl.int32) & 0xFFFF
    table = tl.minimum(tl.where(number < L, number, number - L), L - 1)
    begin = tl.load(offsets_ptr + table * W + code)
    at = ids_ptr + tl.cast(table, tl.int64) * n + begin
    tl.load(at + tl.arange(0, LINES) * 32, volatile=True)


@triton.jit
def _meet_one(met_ptr, rows_ptr, count, size, at, once, listed) -> tl.tensor:
    """Count that the row at an address is met, and list it if that is for the second time."""
    row = tl.load(at).to(tl.int32)
    met = tl.load(met_ptr + row).to(tl.int32)
    tl.store(met_ptr + row, tl.where(met < once, once, listed).to(tl.uint8))
    # whatever it is, the next one overwrites what is not listed: nobody guesses which ones are
    tl.store(rows_ptr + count, row.to(rows_ptr.dtype.element_ty), mask=count < size)
    return count + (met == once).to(tl.int32)


@triton.jit
def _meet_many(
    met_ptr, rows_ptr, count, at, left, once, listed, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """Do the same for the first ``left`` of a tile of rows, which has no row twice."""
    lanes = tl.arange(0, BLOCK_N)
    row = tl.load(at + lanes, mask=lanes < left, other=0).to(tl.int32)
    met = tl.load(met_ptr + row, mask=lanes < left, other=0).to(tl.int32)
    now = tl.where(met < once, once, listed)
    tl.store(met_ptr + row, now.to(tl.uint8), mask=lanes < left)
    count = _append(rows_ptr, count, row, met == once)
    tl.debug_barrier()
    return count


@triton.jit
def _probe_segment(
    codes_ptr, ids_ptr, offsets_ptr, met_ptr, rows_ptr, size, most, n, L, W, before,
    TABLES: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """List the rows of a segment that are met twice in the tables of one query head.

    No counter is above ``before``. Once met by query head g of the list, it is ``2 g + 1`` above;
    listed, as much as no later head of the list can make it.
    """
    count = size * 0
    listed = before + L // TABLES * 2
    for table in range(L):
        if AHEAD:
            _fetch_bucket(
                codes_ptr, ids_ptr, offsets_ptr, table + AHEAD, most, n, L, W, AHEAD, LINES
            )
        code = tl.load(codes_ptr + table).to(tl.int32) & 0xFFFF
        bucket = offsets_ptr + table * W + code
        end = tl.load(bucket + 1)
        at = ids_ptr + tl.cast(table, tl.int64) * n
        once = before + table // TABLES * 2 + 1
        for i in range(tl.load(bucket), end, BLOCK_N):
            if BLOCK_N == 1:
                count = _meet_one(met_ptr, rows_ptr, count, size, at + i, once, listed)
            else:
                count = _meet_many(met_ptr, rows_ptr, count, at + i, end - i, once, listed, BLOCK_N)
    return count


@triton.jit
def _probe_tail(
    codes_ptr, tail_ptr, rows_ptr, size, room, L, TABLES: tl.constexpr, BLOCK_T: tl.constexpr
) -> tl.tensor:
    """List the rows of the tail that are met twice in the tables of one query head."""
    count = size * 0
    lanes = tl.arange(0, BLOCK_T)
    for i in range(0, size, BLOCK_T):
        is_row = i + lanes < size
        most = tl.zeros((BLOCK_T,), tl.int32)
        for first in range(0, L, TABLES):
            met = tl.zeros((BLOCK_T,), tl.int32)
            for table in range(first, first + TABLES):
                code = tl.load(codes_ptr + table)
                at = tail_ptr + tl.cast(table, tl.int64) * room + i + lanes
                met += (tl.load(at, mask=is_row, other=0) == code).to(tl.int32)
            most = tl.maximum(most, met)
        count = _append(rows_ptr, count, i + lanes, is_row & (most >= 2))
    return count


@triton.jit
def _lsh_probe_kernel(
    # tensors: codes int16 [B lists L]; ids uint16 [B Hk L n]; offsets int32 [S B Hk L W]; tail
    # int16 [B Hk L capacity - n]; met uint8 [B lists / LISTS capacity] and rows uint16 [B lists
    # capacity], counts int32 [B lists S + 1]; bounds int32 [S + 1], where segments start
    codes_ptr, ids_ptr, offsets_ptr, tail_ptr, met_ptr, rows_ptr, counts_ptr, bounds_ptr,
    # int32 [B] or None: one past the last row
    used_ptr,
    # sizes: how many rows there are, where nothing else says so
    S, n, capacity, length, L, W,
    # compile-time: SHARE lists look into the tables of one key head, LISTS of them in a program;
    # TABLES of L belong to one query head; no row is met by two of them
    DEPENDENT: tl.constexpr, SHARE: tl.constexpr, TABLES: tl.constexpr, LISTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    s = tl.program_id(0)
    number = tl.program_id(1)
    programs = tl.num_programs(1)
    b = tl.program_id(2)
    Hk = programs * LISTS // SHARE
    own = b.to(tl.int64) * programs + number
    head = b.to(tl.int64) * Hk + number * LISTS // SHARE
    start = tl.load(bounds_ptr + s)
    codes_ptr += own * LISTS * L
    rows_ptr += own * LISTS * capacity
    counts_ptr += own * LISTS * (S + 1) + s
    if s < S:
        size = tl.load(bounds_ptr + s + 1) - start
        heads = tl.num_programs(2).to(tl.int64) * Hk
        ids_ptr += head * L * n + start
        offsets_ptr += (s * heads + head) * L * W
        met_ptr += own * capacity + start
        if AHEAD:
            for table in range(AHEAD):
                _fetch_bucket(
                    codes_ptr, ids_ptr, offsets_ptr, table, LISTS * L, n, L, W, AHEAD, LINES
                )
        places = tl.arange(0, BLOCK_C)
        for i in range(0, size, BLOCK_C):
            tl.store(met_ptr + i + places, tl.zeros((BLOCK_C,), tl.uint8), mask=i + places < size)
        tl.debug_barrier()
        for j in range(LISTS):
            count = _probe_segment(
                codes_ptr + j * L, ids_ptr, offsets_ptr, met_ptr, rows_ptr + j * capacity + start,
                size, (LISTS - j) * L, n, L, W, j * (L // TABLES * 2),
                TABLES, BLOCK_N, AHEAD, LINES,
            )  # fmt: skip
            tl.store(counts_ptr + j * (S + 1), count)
    else:
        if used_ptr is not None:
            length = tl.load(used_ptr + b)
        room = capacity - n
        tail = tail_ptr + head * L * room
        for j in range(LISTS):
            count = _probe_tail(
                codes_ptr + j * L, tail, rows_ptr + j * capacity + n, length - n, room, L,
                TABLES, BLOCK_T,
            )  # fmt: skip
            tl.store(counts_ptr + j * (S + 1), count)


def launch_probe(
    codes: Tensor, ids: Tensor, offsets: Tensor, tail: Tensor, bounds: Tensor, *,
    tables: int, length: int, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """List the rows that queries meet in two tables or more, by launches alone.

    Args:
        codes: int16 [B lists L], of the queries.
        ids: uint16 [B Hk L n].
        offsets: int32 [S B Hk L 2**K + 1].
        tail: int16 [B Hk L room], codes of rows from n on.
        bounds: int32 [S + 1].
        tables: of one query head; the L codes of a list may be those of several, one head after the
            other, and a row is listed that any of them meets twice.
        length: how many rows there are.
        used: int32 [B], the same on the device; the number may be another by then.

    Returns:
        rows uint16 [B lists n + room]: those of segment s from where it starts, counted from there;
        those of the tail from n on. And counts int32 [B lists S + 1].
    """
    (B, lists, L), (Hk, n, room) = codes.shape, (ids.shape[1], ids.shape[-1], tail.shape[-1])
    S, share = offsets.shape[0], lists // Hk
    config = dict(tiles("lsh_probe", tables, codes.device))
    config["LISTS"] = math.gcd(share, config["LISTS"])
    programs = lists // config["LISTS"]
    met = torch.empty((B, programs, n + room), dtype=torch.uint8, device=codes.device)
    rows = torch.empty((B, lists, n + room), dtype=torch.uint16, device=codes.device)
    counts = torch.empty((B, lists, S + 1), dtype=torch.int32, device=codes.device)
    launch(_lsh_probe_kernel, (S + 1, programs, B))(
        codes, ids, offsets, tail, met, rows, counts, bounds, used,
        S, n, n + room, length, L, offsets.shape[-1],
        SHARE=share, TABLES=tables, **config, **dependent(codes.device),
    )  # fmt: skip
    return rows, counts
