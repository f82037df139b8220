"""Triton draw of verified sampling: how many rows the error asks for, and which.

One program serves one group of heads. It draws a few rows of those that are not read in any case,
and learns from their scores how far apart the terms of the sum lie; from that follows how many rows
the sum has to be estimated from; and it draws these anew. Rows are drawn in the order of a random
permutation: numbers below a power of two, mixed four times by what can be undone, of which those
count that are rows. Nothing but the seed and the length decides about the order.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.lsh_sampling.gather import Parts
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles
from bitnet_triton.runtime.device import smallest_dot


@triton.jit
def _mix(x) -> tl.tensor:
    """Mix 32 bits (lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _permuted(j, bits, key) -> tl.tensor:
    """Return what a permutation of the numbers below 2**bits makes of j, uint32."""
    x = j.to(tl.uint32)
    everything = (tl.full((), 1, tl.uint32) << bits) - 1
    shift = (bits + 1) // 2
    for _ in tl.static_range(4):
        factor = _mix(key) | 1
        x = (x * factor + _mix(factor)) & everything
        x = x ^ (x >> shift)
        key = key + 0x9E3779B9
    return x


@triton.jit
def _draw_rows(
    list_ptr, wanted, n, bits, key, flags_ptr, first, PAGE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """List the first ``wanted`` rows of a permutation whose pages are not flagged."""
    count = wanted * 0
    j = count
    lanes = tl.arange(0, BLOCK)
    while (count < wanted) & (j < (1 << bits)):
        row = _permuted(j + lanes, bits, key).to(tl.int32)
        is_row = (j + lanes < (1 << bits)) & (row >= 0) & (row < n)
        flag = tl.load(flags_ptr + row // PAGE, mask=is_row, other=1).to(tl.int32)
        taken = (is_row & (flag == 0)).to(tl.int32)
        at = count + tl.cumsum(taken, 0) - taken
        tl.store(list_ptr + at, first + row, mask=(taken > 0) & (at < wanted))
        count += tl.sum(taken, axis=0)
        j += BLOCK
    tl.debug_barrier()


@triton.jit
def _log_below(y) -> tl.tensor:
    """Return the logarithm of how probably a normal number is below y."""
    a = tl.maximum(-y, 0.0) * 0.7071067811865476
    far = tl.log(0.5 * libdevice.erfcx(a)) - a * a
    near = tl.log(0.5 + 0.5 * tl.erf(tl.maximum(y, 0.0) * 0.7071067811865476))
    return tl.where(y < 0, far, near)


@triton.jit
def _normal_spread(mean, variance, size, left, deviations, log_sure) -> tl.tensor:
    """Return the variance of exponentials of normal numbers, as ``normal_spread_reference``."""
    variance *= 1 + deviations * tl.sqrt(2.0 / size)
    deviation = tl.sqrt(variance)
    log_left = tl.maximum(tl.log(tl.maximum(left, 1).to(tl.float32)) + log_sure, 1.0)
    far = tl.sqrt(2 * log_left)
    most = far - (tl.log(log_left) + 2.5310242469692907) / (2 * far)
    first = tl.exp(tl.minimum(mean + variance / 2 + _log_below(most - deviation), 40.0))
    second = tl.exp(tl.minimum(2 * (mean + variance) + _log_below(most - 2 * deviation), 80.0))
    return tl.maximum(second - first * first, 0.0)


@triton.jit
def _verified_draw_kernel(
    # tensors: q [B 1 H D]; k [B Tk Hk D]; lse float32 [B 1 H P] in base 2, of what is read in any
    # case, in the first READ of P parts; pages int32 [B Hk SELECTED]; flags uint8 [B Hk pages];
    # base and rows int32 [B Hk capacity]; counts int32 and weights float32 [B Hk]
    q_ptr, k_ptr, lse_ptr, pages_ptr, flags_ptr, base_ptr, rows_ptr, counts_ptr, weights_ptr,
    # int32 [B] or None: the first valid row, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    # sizes and scalars: rows of the base sample, z, -log of how probably more is allowed
    Tk, all_pages, capacity, base, seed, deviations, log_sure, epsilon, scale_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SELECTED: tl.constexpr,
    PAGE: tl.constexpr, READ: tl.constexpr, PARTS: tl.constexpr, NORMAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_S: tl.constexpr = triton.next_power_of_2(SELECTED)
    BLOCK_P: tl.constexpr = triton.next_power_of_2(READ)
    kv = tl.program_id(0)
    Hk = tl.num_programs(0)
    b = tl.program_id(1)
    batch = b.to(tl.int64)
    own = batch * Hk + kv
    used = Tk + 0 * b
    first = 0 * b
    if used_ptr is not None:
        used = tl.minimum(tl.load(used_ptr + b), Tk)
    if leftpad_ptr is not None:
        first = tl.minimum(tl.load(leftpad_ptr + b), used)
    n = used - first
    flags_ptr += own * all_pages
    base_ptr += own * capacity
    rows_ptr += own * capacity

    # which pages are read in any case, and how many rows are left
    places = tl.arange(0, BLOCK_C)
    for i in range(0, all_pages, BLOCK_C):
        tl.store(flags_ptr + i + places, tl.zeros((BLOCK_C,), tl.uint8), i + places < all_pages)
    tl.debug_barrier()
    s = tl.arange(0, BLOCK_S)
    page = tl.load(pages_ptr + own * SELECTED + s, mask=s < SELECTED, other=-1)
    tl.store(flags_ptr + page, tl.full((BLOCK_S,), 1, tl.uint8), mask=page >= 0)
    size = tl.minimum(n - page * PAGE, PAGE)
    left = n - tl.sum(tl.where(page >= 0, size, 0), axis=0)
    tl.debug_barrier()
    bits = 1 + 0 * b
    while (1 << bits) < n:
        bits += 1
    # not the row of the batch: it draws what it would draw alone
    key = _mix(tl.cast(seed, tl.uint32) + _mix(n.to(tl.uint32)) + kv.to(tl.uint32) * 0x9E3779B9)
    base = tl.minimum(base, left)
    _draw_rows(base_ptr, base, n, bits, key, flags_ptr, first, PAGE, BLOCK_J)

    # sums of powers of the terms, by a pivot for each head
    m = tl.arange(0, ROWS)
    head = kv * GROUP + m
    is_head = m < GROUP
    at = q_ptr + batch * q_stride_b
    q = load_rows(at, head, q_stride_h, is_head, D, BLOCK_D)  # [ROWS, BLOCK_D]
    k_ptr += batch * k_stride_b + kv * k_stride_h
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    cubes = tl.zeros((ROWS,), tl.float32)
    fourths = tl.zeros((ROWS,), tl.float32)
    # and of the exponents, from one of them on
    anchor = tl.zeros((ROWS,), tl.float32)
    exponents = tl.zeros((ROWS,), tl.float32)
    exponent_squares = tl.zeros((ROWS,), tl.float32)
    for i in range(0, base, BLOCK_N):
        lanes = i + tl.arange(0, BLOCK_N)
        row = tl.load(base_ptr + lanes, mask=lanes < base, other=0)
        k = load_rows(k_ptr, row, k_stride_t, lanes < base, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [ROWS, BLOCK_N]
        scores = tl.where((lanes < base)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        terms = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(terms, 1)
        squares = squares * shrink * shrink + tl.sum(terms * terms, 1)
        cubes = cubes * shrink * shrink * shrink + tl.sum(terms * terms * terms, 1)
        fourths = fourths * shrink * shrink * shrink * shrink
        fourths += tl.sum(terms * terms * terms * terms, 1)
        top = new_top
        if NORMAL:
            anchor = tl.where(i == 0, new_top, anchor)
            off = tl.where((lanes < base)[None, :], scores - anchor[:, None], 0.0)
            exponents += tl.sum(off, 1)
            exponent_squares += tl.sum(off * off, 1)

    p = tl.arange(0, BLOCK_P)
    at = lse_ptr + ((batch * Hk * GROUP + head) * PARTS)[:, None] + p[None, :]
    lse = tl.load(at, mask=is_head[:, None] & (p < READ)[None, :], other=float("-inf"))
    read = tl.sum(tl.exp2(tl.where(base > 0, lse - top[:, None], float("-inf"))), axis=1)
    size = tl.maximum(base, 1)
    mean = total / size
    variance = tl.maximum(squares - total * mean, 0.0) / tl.maximum(base - 1, 1)
    # the largest variance that such a sample may well come from, by the law of variances
    fourth = fourths - 4 * mean * cubes + 6 * mean * mean * squares - 3 * mean * mean * mean * total
    doubt = tl.maximum(fourth / size - variance * variance, 0.0) / size
    spread = variance + deviations * tl.sqrt(doubt)
    if NORMAL:
        # of exponents in base e, and from the pivot on
        exponent = exponents / size
        exponent_variance = exponent_squares - exponents * exponent
        exponent_variance = tl.maximum(exponent_variance, 0.0) / tl.maximum(base - 1, 1)
        exponent = tl.where(base > 0, exponent + anchor - top, 0.0) * 0.6931471805599453
        exponent_variance *= 0.4804530139182014
        normal = _normal_spread(exponent, exponent_variance, size, left, deviations, log_sure)
        spread = tl.maximum(spread, normal)
    # b >= (z sigma n / (epsilon D))**2 of rows that are put back, fewer of those that are not
    asked = deviations / epsilon * left / tl.maximum(read + left * mean, 1e-30)
    asked = tl.minimum(asked * asked * spread, 1e30)
    asked = asked / (1 + asked / tl.maximum(left, 1))
    wanted = tl.max(tl.where(is_head, tl.ceil(asked), 0.0), axis=0)
    wanted = tl.minimum(tl.maximum(wanted.to(tl.int32), base), left)
    # the rows that told the spread have had their say: others are summed up
    _draw_rows(rows_ptr, wanted, n, bits, _mix(key), flags_ptr, first, PAGE, BLOCK_J)
    tl.store(counts_ptr + own, wanted)
    share = left.to(tl.float32) / tl.maximum(wanted, 1)
    tl.store(weights_ptr + own, tl.log2(tl.maximum(share, 1.0)))


def launch_draw(
    q: Tensor, k: Tensor, parts: Parts, pages: Tensor, *,
    read: int, page: int, base: int, deviations: float, epsilon: float, seed: int, scale: float,
    tails: str,
    leftpad: Tensor | None, used: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw as many rows as the error asks for, by launches alone.

    Args:
        q: [B 1 H D], last dimension contiguous.
        k: [B Tk Hk D], likewise.
        parts: what the chosen pages gave, in the first ``read`` parts.
        pages: int32 [B 1 Hk selected], -1 for none.
        read: how many parts.
        page: rows of a page.
        base: rows that tell how far terms lie apart, and the fewest that are drawn.
        deviations: z, by how many standard errors the sum may be off.
        epsilon: as what share of the sum.
        seed: below 2**31.
        scale: multiplies the scores.
        tails: what terms the base sample may have missed, as ``verified_sampling_attention``.
        leftpad: int32 [B], the first row that is no padding; None: the first one.
        used: int32 [B], one past the last row; None: all.

    Returns:
        rows int32 [B Hk Tk], counts int32 [B Hk 1] and log weights float32 [B Hk 1], in base 2.
    """
    (B, _, H, D), (Tk, Hk), device = q.shape, k.shape[1:3], q.device
    flags = torch.empty((B, Hk, cdiv(Tk, page)), dtype=torch.uint8, device=device)
    base_rows, rows = (torch.empty((B, Hk, Tk), dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty((B, Hk, 1), dtype=torch.int32, device=device)
    weights = torch.empty((B, Hk, 1), dtype=torch.float32, device=device)
    log_sure = -math.log(2 * NormalDist().cdf(-deviations))
    launch(_verified_draw_kernel, (Hk, B))(
        q, k, parts.lse, pages, flags, base_rows, rows, counts, weights,
        leftpad, used,
        q.stride(0), q.stride(2), *k.stride()[:3],
        Tk, flags.shape[-1], Tk, base, seed, deviations, log_sure, epsilon,
        score_factors(scale, None)[0],
        GROUP=H // Hk, D=D, SELECTED=pages.shape[-1], PAGE=page, READ=read,
        PARTS=parts.lse.shape[-1], NORMAL=tails == "normal",
        ROWS=max(triton.next_power_of_2(H // Hk), smallest_dot(device)),
        **tiles("verified_draw", D, device), **dependent(device),
    )  # fmt: skip
    return rows, counts, weights
