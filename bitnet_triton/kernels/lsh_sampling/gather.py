"""Triton attention to listed rows: scattered reads, a log weight for each row, online softmax.

One program takes a split of one list for the query heads that share it, or the rows that are read
in any case: the first ones and the latest ones. Results are merged by the second kernel of
``flash_attention/decode.py``. How long lists are is read from memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, softmax_step, store_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.decode import launch_merge
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# how probable a row was: by its angle with the query of its head, with any query of the group, with
# their mean direction; or a weight of the whole list
OWN, UNION, PROPOSAL, LISTED = (tl.constexpr(kind) for kind in range(4))
KINDS = {"own": OWN, "union": UNION, "proposal": PROPOSAL}

_LEAST_PROBABILITY = tl.constexpr(1e-30)
_PI = tl.constexpr(3.141592653589793)


class Angles(NamedTuple):
    """What tells how probably a row was sampled.

    Attributes:
        centre: float32 [B Hk D].
        norms: float32 [B Hk rows], how far each key is from it.
        direction: float32 [B 1 Hk D], the mean one of each group; None: queries have their own.
        bits: of a code.
        tables: of one list.
    """

    centre: Tensor
    norms: Tensor
    direction: Tensor | None
    bits: int
    tables: int


class Rows(NamedTuple):
    """Lists of rows.

    Attributes:
        rows: uint16 or int32 [B lists capacity].
        counts: int32 [B lists S], how long each is; None: one list, which is full.
        starts: int32 [S], where list s starts in ``rows``, and what its numbers count from; None:
            one list, of rows of the whole.
        log_weights: float32 [B lists S], in base 2; None: by ``Angles``, or 0 without any.
        page: ``rows`` are numbers of pages of so many rows, below 0 for none; None: they are rows.
    """

    rows: Tensor
    counts: Tensor | None = None
    starts: Tensor | None = None
    log_weights: Tensor | None = None
    page: int | None = None


@triton.jit
def _either(a, b) -> tl.tensor:
    """Return how probable one of two independent events is."""
    return a + b * (1 - a)


@triton.jit
def _share_of_planes(cosine) -> tl.tensor:
    """Return 1 - arccos(c) / pi to the last bits of float32 (Abramowitz, Stegun 4.4.46)."""
    c = tl.abs(cosine)
    y = -0.0012624911 * c + 0.0066700901
    y = y * c - 0.0170881256
    y = y * c + 0.0308918810
    y = y * c - 0.0501743046
    y = y * c + 0.0889789874
    y = y * c - 0.2145988016
    y = y * c + 1.5707963050
    angle = tl.sqrt(tl.maximum(1 - c, 0.0)) * y / _PI
    return tl.where(cosine < 0, angle, 1 - angle)


@triton.jit
def _probability(cosine, tables, BITS: tl.constexpr) -> tl.tensor:
    """Return how probably a key is met in two tables or more, as ``probability_reference``."""
    p = _share_of_planes(tl.minimum(tl.maximum(cosine, -1.0), 1.0))
    x = p
    for _ in tl.static_range(BITS - 1):
        x = x * p
    x = tl.minimum(x, 1 - 1e-7)
    # log(1 - x), to its last bits where x is small
    series = x * (1 + x * (0.5 + x * (1 / 3 + x * (0.25 + x * (0.2 + x / 6)))))
    log_none = tl.where(x < 0.03, -series, tl.log(1 - x))
    ratio = x / (1 - x)
    small = 1.0 + 0 * x
    for i in tl.static_range(9):
        # terms j = 11 .. 3 of the binomial sum, each by the one before
        small = 1 + small * (ratio * (tl.maximum(tables - 10 + i, 0.0) / (11 - i)))
    small *= tables * (tables - 1) / 2 * x * x * tl.exp((tables - 2) * log_none)
    large = 1 - tl.exp((tables - 1) * log_none) * (1 + (tables - 1) * x)
    return tl.where(tables * x < 1, small, large)


@triton.jit
def _log_weight(
    dots, q, centre, norms, is_head, direction_norm, direction_shift,
    tables, KIND: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return in base 2 what divides rows by how probable they were, [ROWS or 1, BLOCK_N]."""
    q = q.to(tl.float32)
    length = tl.sqrt(tl.sum(q * q, axis=1))
    if KIND == PROPOSAL:
        # the mean of normalised queries meets a key where they do
        part = tl.where(is_head, 1 / (tl.maximum(length, 1e-30) * GROUP), 0.0)
        towards = tl.sum(dots * part[:, None], axis=0)
        cosine = (towards - direction_shift) / (direction_norm * norms)
        u = _probability(cosine[None, :], tables, BITS)
    else:
        shift = tl.sum(q * centre[None, :], axis=1)
        cosine = (dots - shift[:, None]) / tl.maximum(length[:, None] * norms[None, :], 1e-30)
        u = _probability(cosine, tables, BITS)
        if KIND == UNION:
            u = tl.where(is_head[:, None], u, 0.0)
            u = tl.reduce(u, 0, _either)[None, :]
    return -tl.log2(tl.maximum(u, _LEAST_PROBABILITY))


@triton.jit
def _listed_rows(rows_ptr, lanes, count, start, first, PAGE: tl.constexpr) -> tuple:
    """Return the rows number ``lanes`` of a list, and which of them it has."""
    exists = lanes < count
    if PAGE is None:
        return tl.load(rows_ptr + lanes, mask=exists, other=0).to(tl.int32) + start, exists
    else:
        page = tl.load(rows_ptr + lanes // PAGE, mask=exists, other=-1)
        return first + tl.maximum(page, 0) * PAGE + lanes % PAGE, page >= 0


@triton.jit
def _rows_to_read(
    rows_ptr, lanes, count, start, first, early, late, is_exact, PAGE: tl.constexpr
) -> tuple:
    """Return the rows number ``lanes``, of a list or of those in any case, and which there are."""
    is_row = lanes < count
    listed, exists = _listed_rows(rows_ptr, lanes, count, start, first, PAGE)
    always = tl.where(lanes < early - first, first + lanes, late + lanes - (early - first))
    row = tl.where(is_exact, always, listed)
    # rows behind the last one may hold anything, and NaN times a weight of 0 is NaN
    return row, is_row & (is_exact | (exists & (row >= early) & (row < late)))


@triton.jit
def _fetch(rows, ptr, stride_t, D: tl.constexpr) -> None:
    """Ask for rows, a cache line at a time: a load that is not used fetches."""
    LINE: tl.constexpr = 64 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(D, LINE))) * LINE
    at = ptr + rows.to(tl.int64)[:, None] * stride_t + tl.minimum(line, D - 1)[None, :]
    tl.load(at, volatile=True)


@triton.jit
def _lsh_gather_kernel(
    # tensors: q [B 1 H D]; k [B Tk Hk D]; v [B Tk Hk DV]; out float32 [B 1 H P DV] and lse float32
    # [B 1 H P] in base 2, of P parts
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # lists, as in Rows: rows [B lists capacity], counts and log weights [B lists S], starts [S],
    # the last three or None
    rows_ptr, counts_ptr, starts_ptr, weights_ptr,
    # as in Angles: [B Hk D], [B Hk rows], [B 1 Hk D], or None
    centre_ptr, norms_ptr, direction_ptr,
    # int32 [B] or None: the first valid row, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    norms_stride_b, norms_stride_h,
    # sizes and scalars
    Tk, S, capacity, part0, sinks, recent, scale_log2, tables,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, KIND: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    part = tl.program_id(0)
    number = tl.program_id(1)
    lists = tl.num_programs(1)
    H = lists * HEADS
    key_head = number * HEADS // GROUP
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    own = batch * lists + number
    used = Tk + 0 * b
    first = 0 * b
    if used_ptr is not None:
        used = tl.minimum(tl.load(used_ptr + b), Tk)
    if leftpad_ptr is not None:
        first = tl.minimum(tl.load(leftpad_ptr + b), used)

    # what is read in any case: the first rows, and those from ``late`` on
    early = tl.minimum(first + sinks, used)
    late = tl.maximum(used - recent, early)
    s = tl.minimum(part // SPLITS, S - 1)
    is_exact = part == S * SPLITS
    start = 0 * b
    count = early - first + used - late
    begin = 0 * b
    weight = 0.0
    if not is_exact:
        count = capacity + 0 * b
        if starts_ptr is not None:
            start = tl.load(starts_ptr + s)
        if counts_ptr is not None:
            count = tl.load(counts_ptr + own * S + s)
        if PAGE is not None:
            count *= PAGE
        length = tl.cdiv(count, SPLITS)
        begin = part % SPLITS * length
        count = tl.minimum(begin + length, count)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + own * S + s)

    m = tl.arange(0, ROWS)
    head = number * HEADS + m
    is_head = m < HEADS
    at = q_ptr + batch * q_stride_b
    q = load_rows(at, head, q_stride_h, is_head, D, BLOCK_D)  # [ROWS, BLOCK_D]
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    kv = batch * (H // GROUP) + key_head
    centre = tl.zeros((BLOCK_D,), tl.float32)
    if KIND != LISTED:
        centre = tl.load(centre_ptr + kv * D + dims, mask=is_dim, other=0.0)
        norms_ptr += batch * norms_stride_b + key_head * norms_stride_h
    direction = centre
    if KIND == PROPOSAL:
        direction = tl.load(direction_ptr + kv * D + dims, mask=is_dim, other=0.0)
    direction_norm = tl.maximum(tl.sqrt(tl.sum(direction * direction, axis=0)), 1e-30)
    direction_shift = tl.sum(direction * centre, axis=0)

    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h
    rows_ptr += own * capacity + start
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(begin, count, BLOCK_N):
        lanes = i + tl.arange(0, BLOCK_N)
        row, is_row = _rows_to_read(
            rows_ptr, lanes, count, start, first, early, late, is_exact, PAGE
        )
        if AHEAD:
            ahead = tl.where(is_exact, 0, tl.minimum(lanes + AHEAD, count - 1))
            following, _ = _listed_rows(rows_ptr, ahead, count, start, first, PAGE)
            following = tl.minimum(following, Tk - 1)
            _fetch(following, k_ptr, k_stride_t, D)
            if KIND != LISTED:
                tl.load(norms_ptr + following, volatile=True)
        k = load_rows(k_ptr, row, k_stride_t, is_row, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dots = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, BLOCK_N]
        scores = dots * scale_log2
        if KIND == LISTED:
            scores += weight
        else:
            norms = tl.load(norms_ptr + row, mask=is_row, other=1.0)  # [BLOCK_N]
            more = _log_weight(
                dots, q, centre, tl.maximum(norms, 1e-30), is_head, direction_norm,
                direction_shift, tables, KIND, GROUP, BITS,
            )  # fmt: skip
            scores += tl.where(is_exact, 0.0, more)
        scores = tl.where(is_row[None, :], scores, float("-inf"))
        weights, shrink, top, total = softmax_step(top, total, scores, 1.0)
        acc *= shrink[:, None]
        v = load_rows(v_ptr, row, v_stride_t, is_row, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        if AHEAD:
            _fetch(following, v_ptr, v_stride_t, DV)
        if ROWS <= 4:
            # on a CPU: values are widened as they are read, nothing is packed
            acc += tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")  # [ROWS, BLOCK_DV]

    row_out = (batch * H + head) * PARTS + part0 + part
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ptr, row_out, DV, out, is_head, DV, BLOCK_DV)
    tl.store(lse_ptr + row_out, top + tl.log2(total), mask=is_head)


class Parts(NamedTuple):
    """Results to merge: out float32 [B 1 H P DV] and lse float32 [B 1 H P], in base 2."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, count: int, DV: int) -> Parts:
        """Return memory for ``count`` results of queries [B 1 H D]."""
        shape = (*q.shape[:3], count)
        return cls(
            torch.empty((*shape, DV), dtype=torch.float32, device=q.device),
            torch.empty(shape, dtype=torch.float32, device=q.device),
        )

    def merge(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return out [B 1 H DV] in the dtype of ``q`` and lse [B H 1]."""
        B, _, H, _, DV = self.out.shape
        out = torch.empty((B, 1, H, DV), dtype=q.dtype, device=q.device)
        lse = torch.empty((B, H, 1), dtype=torch.float32, device=q.device)
        launch_merge(self.out, self.lse, out, lse)
        return out, lse


def list_splits(device: torch.device, is_shared: bool) -> int:
    """Return among how many programs a list is divided: a GPU has more to occupy."""
    if smallest_dot(device) == 1:
        return 2 if is_shared else 1
    return 8


def launch_gather(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, parts: Parts, *,
    part0: int, exact: tuple[int, int] | None, scale: float, angles: Angles | None = None,
    kind: str = "own", leftpad: Tensor | None = None, used: Tensor | None = None,
    among: tuple[int, int] | None = None,
) -> int:  # fmt: skip
    """Attend to listed rows, and to exact ones, by launches alone; return the next free part.

    Args:
        q: [B 1 H D], last dimension contiguous.
        k: [B Tk Hk D], likewise.
        v: [B Tk Hk DV], likewise.
        rows: lists of query heads, or of groups.
        parts: where results go, from ``part0`` on.
        part0: the first free part.
        exact: how many first and latest rows are read in any case, and in no list; None: they are
            somebody else's, and ``among`` says how many.
        scale: multiplies the scores.
        angles: says how probable rows were; None: lists have a weight.
        kind: "own", "union" or "proposal".
        leftpad: int32 [B], the first row that is no padding.
        used: int32 [B], one past the last row.
        among: first and latest rows that no list has, for ``exact`` None.
    """
    (B, _, H, D), (Tk, Hk), DV = q.shape, k.shape[1:3], v.shape[-1]
    lists = rows.rows.shape[1]
    S = 1 if rows.counts is None else rows.counts.shape[2]
    splits = list_splits(q.device, lists <= Hk)
    count = S * splits + (exact is not None)
    sinks, recent = exact or among or (0, 0)
    heads = H // lists
    launch(_lsh_gather_kernel, (count, lists, B))(
        q, k, v, *parts,
        rows.rows, rows.counts, rows.starts, rows.log_weights,
        *((None, None, None) if angles is None else angles[:3]),
        leftpad, used,
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        *((0, 0) if angles is None else angles.norms.stride()[:2]),
        Tk, S, rows.rows.shape[-1], part0, sinks, recent, score_factors(scale, None)[0],
        2.0 if angles is None else float(angles.tables),  # a float: no kernel for each number
        GROUP=H // Hk, HEADS=heads, D=D, DV=DV,
        KIND=LISTED.value if angles is None else KINDS[kind].value, PAGE=rows.page,
        BITS=1 if angles is None else angles.bits,
        SPLITS=splits, PARTS=parts.lse.shape[-1],
        ROWS=max(triton.next_power_of_2(heads), smallest_dot(q.device)),
        **tiles("lsh_gather", head_size(max(D, DV), q.dtype), q.device), **dependent(q.device),
    )  # fmt: skip
    return part0 + count
