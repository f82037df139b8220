"""Triton forward of compressed attention, and the choice of blocks in the same pass.

One item is a tile of queries and a key head. For each query head that shares it, the compressed
keys are read once: while the softmax runs, the weights of a tile of keys are summed by selection
block, by true overlap, and kept with the maximum that they are relative to. At the end they are put
in proportion, summed over the heads, and the largest are taken. A program goes through its items
one after the other and keeps the sums of one, so that no more of [T, N / ratio] exists at a time
than programs run; scores are computed once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnet_triton.kernels.common.attention import load_rows, raw_scores, softmax_step, store_rows
from bitnet_triton.kernels.common.best.forward import ranks

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(rows_ptr, B, tile, COLUMN: tl.constexpr, BLOCK: tl.constexpr) -> tuple:
    """Return the sequence of a tile, and the number of the tile in it.

    Tiles of packed sequences stand behind one another, as if each before wasted one.
    """
    b = tile * 0
    end = b + B
    while end - b > 1:
        middle = (b + end) // 2
        is_before = tl.load(rows_ptr + 4 * middle + COLUMN) // BLOCK + middle <= tile
        b = tl.where(is_before, middle, b)
        end = tl.where(is_before, end, middle)
    return b, tile - tl.load(rows_ptr + 4 * b + COLUMN) // BLOCK - b


@triton.jit
def open_tile(rows_ptr, B, tile, b, Tq, before, BLOCK: tl.constexpr) -> tuple:
    """Return the sequence of a tile of queries, its number, and its line of ``SparseCall.rows``.

    B is None where sequences are not packed, and then b is the one.
    """
    start = 0
    length = Tq
    first = 0
    if rows_ptr is not None:
        if B is not None:
            b, tile = find_sequence(rows_ptr, B, tile, 0, BLOCK)
        start = tl.load(rows_ptr + 4 * b)
        length = tl.load(rows_ptr + 4 * b + 1)
        first = tl.load(rows_ptr + 4 * b + 2)
        before = tl.load(rows_ptr + 4 * b + 3)
    return b, tile, start, length, first, before


@triton.jit
def seen_blocks(position, block, stride) -> tl.tensor:
    """Count the compression blocks that lie up to a position as a whole."""
    return tl.maximum(position + 1 - block + stride, 0) // stride


@triton.jit
def _block_sums(
    weights, UNITS: tl.constexpr, RATIO: tl.constexpr, LINES: tl.constexpr, BLOCK_J: tl.constexpr
) -> tuple:
    """Sum weights [M, LINES BLOCK_J] by selection block [M, BLOCK_J]: one's own, and the next."""
    lines = tl.reshape(weights, (weights.shape[0], LINES, BLOCK_J))
    own = tl.minimum(RATIO - tl.arange(0, LINES), UNITS)
    sums = tl.sum(lines * own.to(tl.float32)[None, :, None], axis=1)
    over = (UNITS - own).to(tl.float32)
    return sums, tl.sum(lines * over[None, :, None], axis=1)


@triton.jit
def add_tile(
    # of the rows
    acc, top, total, q,
    # compressed keys and values; which ones rows see, None: all; how many there are; the tile
    k_ptr, v_ptr, k_stride, v_stride, n, seen, t,
    # where sums by selection block go, [M BLOCK_J], and what they are relative to
    sums_at, next_sums, pivots_at, scale_log2,
    # compile-time
    D: tl.constexpr, DV: tl.constexpr, UNITS: tl.constexpr, RATIO: tl.constexpr,
    ATTEND: tl.constexpr, SELECT: tl.constexpr, LINES: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple:  # fmt: skip
    """Take a tile of compressed keys into the running softmax, and sum its weights by block."""
    BLOCK_J: tl.constexpr = BLOCK_N // LINES
    lanes = tl.arange(0, BLOCK_N)
    # line by line, what begins at the same place of BLOCK_J selection blocks
    i = (t * BLOCK_J + lanes % BLOCK_J) * RATIO + lanes // BLOCK_J
    is_key: tl.tensor = None
    if n is not None:
        is_key = (i < seen) & (lanes // BLOCK_J < RATIO)
    k = load_rows(k_ptr, i, k_stride, is_key, D, triton.next_power_of_2(D))  # [BLOCK_N, BLOCK_D]
    scores, factor = raw_scores(q, k, scale_log2, None)  # [BLOCK_M, BLOCK_N]
    if n is not None:
        visible = i[None, :] < n[:, None]
        if LINES != RATIO:
            visible = visible & is_key[None, :]
        scores = tl.where(visible, scores, float("-inf"))
    weights, shrink, top, total = softmax_step(top, total, scores, factor)
    if ATTEND:
        v = load_rows(v_ptr, i, v_stride, is_key, DV, triton.next_power_of_2(DV))
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    if SELECT:
        own, over = _block_sums(weights, UNITS, RATIO, LINES, BLOCK_J)
        at = sums_at + t * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        tl.store(at, own)
        tl.store(at + next_sums, over)
        pivot = tl.where(top == float("-inf"), 0.0, top) * factor
        tl.store(pivots_at + t * q.shape[0], pivot)
    return acc, top, total


@triton.jit
def rank_blocks(total, j, own, initial, local) -> tl.tensor:
    """Return the ranks [M, J] of selection blocks j by their scores; the forced ones come first."""
    is_forced = (j[None, :] < initial) | (j[None, :] > own[:, None] - local)
    total = tl.where(is_forced, float("inf"), total)
    return tl.where(j[None, :] <= own[:, None], ranks(total, j[None, :]), -(2**62))


@triton.jit
def take_best(
    ranks_ptr, stride, indices_ptr, places, is_row, count, SELECTED: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:  # fmt: skip
    """Store at ``places`` the indices of the largest of ``count`` ranks of each row, then -1."""
    rows = tl.arange(0, places.shape[0])
    cols = tl.arange(0, BLOCK_J)
    # no two ranks of a row are equal: the next one is the largest below the last
    last = tl.full((places.shape[0],), 2**63 - 1, tl.int64)
    for s in range(SELECTED):
        best = tl.full((places.shape[0], BLOCK_J), -(2**62), tl.int64)
        for start in range(0, count, BLOCK_J):
            at = ranks_ptr + rows[:, None] * stride + (start + cols)[None, :]
            rank = tl.load(at)  # [ROWS, BLOCK_J], whole chunks
            best = tl.maximum(best, tl.where(rank < last[:, None], rank, -(2**62)))
        last = tl.max(best, axis=1)
        index = 0x7FFFFFFF - (last & 0x7FFFFFFF).to(tl.int32)
        tl.store(indices_ptr + places + s, tl.where(last > -(2**62), index, -1), mask=is_row)


@triton.jit
def choose_blocks(
    sums_ptr, pivots_ptr, ranks_ptr, indices_ptr, step, length, position, tiles, count, room,
    initial, local, GROUP: tl.constexpr, SELECTION: tl.constexpr, SELECTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Choose among ``count`` selection blocks by the sums of the heads of a group.

    step: from the indices of a row to those of the next; length: rows that there are; position:
    of the first row in its text; tiles: of sums there are. ROWS rows take their blocks at a time.
    """
    m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_J)
    own = (position + m) // SELECTION
    for t in range(tl.cdiv(count, BLOCK_J)):
        j = t * BLOCK_J + cols
        total = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        for g in range(GROUP):
            pivots = pivots_ptr + g * (room // BLOCK_J + 1) * BLOCK_M + m
            lse = tl.load(pivots + (room // BLOCK_J) * BLOCK_M)
            # what a block has beyond its selection block counts for the next one
            before = tl.load(pivots + (t - 1) * BLOCK_M, mask=m * 0 + t > 0, other=float("-inf"))
            pivot = tl.load(pivots + t * BLOCK_M, mask=m * 0 + t < tiles, other=float("-inf"))
            share, share_before = tl.exp2(pivot - lse), tl.exp2(before - lse)
            at = sums_ptr + g * 2 * BLOCK_M * room + m[:, None] * room + j[None, :]
            has = (j < tiles * BLOCK_J)[None, :]
            total += tl.load(at, mask=has, other=0.0) * share[:, None]
            has = ((j > 0) & (j <= tiles * BLOCK_J))[None, :]
            over = tl.load(at + BLOCK_M * room - 1, mask=has, other=0.0)  # [BLOCK_M, BLOCK_J]
            total += over * tl.where((cols == 0)[None, :], share_before[:, None], share[:, None])
        rank = rank_blocks(total, j, own, initial, local)
        tl.store(ranks_ptr + m[:, None] * room + j[None, :], rank)
    tl.debug_barrier()
    for r in range(0, BLOCK_M, ROWS):
        rows = r + tl.arange(0, ROWS)
        take_best(
            ranks_ptr + r * room, room, indices_ptr, rows * step, rows < length, count,
            SELECTED, BLOCK_J,
        )  # fmt: skip


@triton.jit
def _compressed_attention_fwd_kernel(
    # tensors: q [B Tq H D]; k [B N Hk D]; v [B N Hk DV]; out [B Tq H DV]; lse [B H Tq]
    # or None; indices int32 [B Tq Hk SELECTED]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, indices_ptr,
    # of each program, float32: sums [GROUP 2 BLOCK_M room], what they are relative to
    # [GROUP room / BLOCK_J + 1, BLOCK_M], int64: ranks [BLOCK_M room]
    sums_ptr, pivots_ptr, ranks_ptr,
    # int32 [B 4], as ``SparseCall.rows`` has them, or None
    rows_ptr,
    # strides, in elements; those of a sequence are 0 where sequences are packed
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_n, k_stride_h,
    v_stride_b, v_stride_n, v_stride_h,
    # sizes and scalars
    B, Tq, Hk, batch, items, room, before, initial, local, scale_log2,
    # compile-time
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, SELECTION: tl.constexpr, SELECTED: tl.constexpr, ATTEND: tl.constexpr,
    SELECT: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    BLOCK_J: tl.constexpr = BLOCK_N // LINES
    RATIO: tl.constexpr = SELECTION // STRIDE
    H = Hk * GROUP
    m = tl.arange(0, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * (GROUP * 2 * BLOCK_M) * room
    pivots_ptr += program * (GROUP * BLOCK_M) * (room // BLOCK_J + 1)
    ranks_ptr += program * BLOCK_M * room
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        key_head = item % Hk
        # the last rows see most: they come first
        tile = (items - 1 - item) // (Hk * batch)
        b, tile, start, length, first, position = open_tile(
            rows_ptr, B, tile, item // Hk % batch, Tq, before, BLOCK_M
        )
        flat = b.to(tl.int64) if B is None else b.to(tl.int64) * 0
        r = tile * BLOCK_M + m
        is_row = r < length
        row = flat * Tq + start + r
        n = seen_blocks(position + r, BLOCK, STRIDE)
        end = tl.minimum(tile * BLOCK_M + BLOCK_M, length) - 1
        # a tile that its sequence does not have has nothing to see
        end = tl.where(tile * BLOCK_M < length, position + end, -1)
        seen = seen_blocks(end, BLOCK, STRIDE)
        tiles = tl.cdiv(seen, BLOCK_J * RATIO)
        # tiles of keys that every row sees need no mask
        whole = seen_blocks(position + tile * BLOCK_M, BLOCK, STRIDE) // BLOCK_N
        whole = tl.minimum(whole, tiles) if LINES == RATIO else 0
        k_at = k_ptr + flat * k_stride_b + first.to(tl.int64) * k_stride_n + key_head * k_stride_h
        v_at = v_ptr + flat * v_stride_b + first.to(tl.int64) * v_stride_n + key_head * v_stride_h
        for g in range(GROUP):
            head = key_head * GROUP + g
            q_at = q_ptr + flat * q_stride_b + head * q_stride_h
            q = load_rows(q_at, start + r, q_stride_t, is_row, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            sums_at = sums_ptr + g * 2 * BLOCK_M * room + m[:, None] * room
            pivots_at = pivots_ptr + g * (room // BLOCK_J + 1) * BLOCK_M + m
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for t in range(whole):
                acc, top, total = add_tile(
                    acc, top, total, q, k_at, v_at, k_stride_n, v_stride_n, None, seen, t,
                    sums_at, BLOCK_M * room, pivots_at, scale_log2,
                    D, DV, BLOCK // STRIDE, RATIO, ATTEND, SELECT, LINES, BLOCK_N,
                )  # fmt: skip
            for t in range(whole, tiles):
                acc, top, total = add_tile(
                    acc, top, total, q, k_at, v_at, k_stride_n, v_stride_n, n, seen, t,
                    sums_at, BLOCK_M * room, pivots_at, scale_log2,
                    D, DV, BLOCK // STRIDE, RATIO, ATTEND, SELECT, LINES, BLOCK_N,
                )  # fmt: skip
            lse = top * scale_log2 + tl.log2(total)
            if ATTEND:
                out = acc / tl.where(total > 0, total, 1.0)[:, None]
                store_rows(out_ptr, row * H + head, DV, out, is_row, DV, BLOCK_DV)
                if lse_ptr is not None:
                    at_lse = lse_ptr + (flat * H + head) * Tq + start + r
                    tl.store(at_lse, lse * _LN_2, mask=is_row)
            if SELECT:
                # against a row that sees nothing, every weight is 0
                finite = tl.where(total > 0, lse, float("inf"))
                tl.store(pivots_at + (room // BLOCK_J) * BLOCK_M, finite)
        if SELECT:
            tl.debug_barrier()  # one thread reads what another one has stored
            count = end // SELECTION + 1
            choose_blocks(
                sums_ptr, pivots_ptr, ranks_ptr,
                indices_ptr + ((flat * Tq + start + tile * BLOCK_M) * Hk + key_head) * SELECTED,
                Hk * SELECTED, length - tile * BLOCK_M, position + tile * BLOCK_M,
                tiles, count, room, initial, local,
                GROUP, SELECTION, SELECTED, BLOCK_M, BLOCK_J, ROWS,
            )  # fmt: skip
            tl.debug_barrier()
