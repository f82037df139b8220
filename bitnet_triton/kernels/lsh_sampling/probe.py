"""Triton sample of a query: the rows that it meets in two tables or more.

One program takes one segment of the rows, or the tail behind all segments, for one list of rows: of
a query head, or of a group. In a segment it goes through one bucket of each table and counts how
often it meets a row; a row is listed when it is met for the second time. Buckets hold a row once,
so a tile of one bucket writes no counter twice, and lists come in the same order on every device. A
CPU takes row after row: what a tile saves, the compaction of its few new rows costs.
The tail is not sorted: its codes are compared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles

_LISTED = tl.constexpr(255)


@triton.jit
def _append(list_ptr, count, values, is_new) -> tl.tensor:
    """Write the values that are new behind those of a list; return how many it has then."""
    new = is_new.to(tl.int32)
    at = list_ptr + count + tl.cumsum(new, 0) - new
    tl.store(at, values.to(list_ptr.dtype.element_ty), mask=is_new)
    return count + tl.sum(new, axis=0)


@triton.jit
def _fetch_bucket(
    codes_ptr, ids_ptr, offsets_ptr, table, n, L, W, AHEAD: tl.constexpr, LINES: tl.constexpr
) -> None:
    """Ask for the first rows of the bucket of a table, and for where one further on starts.

    A load that is not used fetches, from any address.
    """
    later = tl.minimum(table + AHEAD, L - 1)
    code = tl.load(codes_ptr + later).to(tl.int32) & 0xFFFF
    tl.load(offsets_ptr + later * W + code + tl.arange(0, 1), volatile=True)
    table = tl.minimum(table, L - 1)
    code = tl.load(codes_ptr + table).to(tl.int32) & 0xFFFF
    begin = tl.load(offsets_ptr + table * W + code)
    at = ids_ptr + tl.cast(table, tl.int64) * n + begin
    tl.load(at + tl.arange(0, LINES) * 32, volatile=True)


@triton.jit
def _meet_one(met_ptr, rows_ptr, count, at, once) -> tl.tensor:
    """Count that the row at an address is met, and list it if that is for the second time."""
    row = tl.load(at).to(tl.int32)
    met = tl.load(met_ptr + row).to(tl.int32)
    tl.store(met_ptr + row, tl.where(met < once, once, _LISTED).to(tl.uint8))
    tl.store(rows_ptr + count, row.to(rows_ptr.dtype.element_ty), mask=met == once)
    return count + (met == once).to(tl.int32)


@triton.jit
def _meet_many(met_ptr, rows_ptr, count, at, left, once, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Do the same for the first ``left`` of a tile of rows, which has no row twice."""
    lanes = tl.arange(0, BLOCK_N)
    row = tl.load(at + lanes, mask=lanes < left, other=0).to(tl.int32)
    met = tl.load(met_ptr + row, mask=lanes < left, other=0).to(tl.int32)
    now = tl.where(met < once, once, _LISTED)
    tl.store(met_ptr + row, now.to(tl.uint8), mask=lanes < left)
    count = _append(rows_ptr, count, row, met == once)
    tl.debug_barrier()
    return count


@triton.jit
def _probe_segment(
    codes_ptr, ids_ptr, offsets_ptr, met_ptr, rows_ptr, size, n, L, W,
    TABLES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """List the rows of a segment that are met twice in the tables of one query head."""
    if AHEAD:
        for table in range(AHEAD):
            _fetch_bucket(codes_ptr, ids_ptr, offsets_ptr, table, n, L, W, AHEAD, 4)
    places = tl.arange(0, BLOCK_C)
    for i in range(0, size, BLOCK_C):
        tl.store(met_ptr + i + places, tl.zeros((BLOCK_C,), tl.uint8), mask=i + places < size)
    tl.debug_barrier()
    count = size * 0
    for table in range(L):
        if AHEAD:
            _fetch_bucket(codes_ptr, ids_ptr, offsets_ptr, table + AHEAD, n, L, W, AHEAD, 4)
        code = tl.load(codes_ptr + table).to(tl.int32) & 0xFFFF
        bucket = offsets_ptr + table * W + code
        end = tl.load(bucket + 1)
        at = ids_ptr + tl.cast(table, tl.int64) * n
        # once met by query head g of the list; then it is listed
        once = table // TABLES * 2 + 1
        for i in range(tl.load(bucket), end, BLOCK_N):
            if BLOCK_N == 1:
                count = _meet_one(met_ptr, rows_ptr, count, at + i, once)
            else:
                count = _meet_many(met_ptr, rows_ptr, count, at + i, end - i, once, BLOCK_N)
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
    # int16 [B Hk L capacity - n]; met uint8 and rows uint16 [B lists capacity], counts int32
    # [B lists S + 1]; bounds int32 [S + 1], where segments start
    codes_ptr, ids_ptr, offsets_ptr, tail_ptr, met_ptr, rows_ptr, counts_ptr, bounds_ptr,
    # int32 [B] or None: one past the last row
    used_ptr,
    # sizes: how many rows there are, where nothing else says so
    S, n, capacity, length, L, W,
    # compile-time: TABLES of L belong to one query head; no row is met by two of them
    DEPENDENT: tl.constexpr, SHARE: tl.constexpr, TABLES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    s = tl.program_id(0)
    number = tl.program_id(1)
    lists = tl.num_programs(1)
    b = tl.program_id(2)
    Hk = lists // SHARE
    own = b.to(tl.int64) * lists + number
    head = b.to(tl.int64) * Hk + number // SHARE
    codes_ptr += own * L
    rows_ptr += own * capacity
    start = tl.load(bounds_ptr + s)
    if s < S:
        size = tl.load(bounds_ptr + s + 1) - start
        heads = tl.num_programs(2).to(tl.int64) * Hk
        count = _probe_segment(
            codes_ptr, ids_ptr + head * L * n + start, offsets_ptr + (s * heads + head) * L * W,
            met_ptr + own * capacity + start, rows_ptr + start, size, n, L, W,
            TABLES, BLOCK_N, BLOCK_C, AHEAD,
        )  # fmt: skip
    else:
        if used_ptr is not None:
            length = tl.load(used_ptr + b)
        room = capacity - n
        tail = tail_ptr + head * L * room
        count = _probe_tail(codes_ptr, tail, rows_ptr + n, length - n, room, L, TABLES, BLOCK_T)
    tl.store(counts_ptr + own * (S + 1) + s, count)


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
    S = offsets.shape[0]
    met = torch.empty((B, lists, n + room), dtype=torch.uint8, device=codes.device)
    rows = torch.empty((B, lists, n + room), dtype=torch.uint16, device=codes.device)
    counts = torch.empty((B, lists, S + 1), dtype=torch.int32, device=codes.device)
    launch(_lsh_probe_kernel, (S + 1, lists, B))(
        codes, ids, offsets, tail, met, rows, counts, bounds, used,
        S, n, n + room, length, L, offsets.shape[-1],
        SHARE=lists // Hk, TABLES=tables,
        **tiles("lsh_probe", tables, codes.device), **dependent(codes.device),
    )  # fmt: skip
    return rows, counts
