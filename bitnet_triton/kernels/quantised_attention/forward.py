"""Triton attention over codes of keys and values: bound by reading the codes once.

One program reads one split of the codes of one key head, for a tile of rows: queries times the
query heads that share the key head. All queries see all codes. Keys and values lie rotated, so the
queries come rotated, and what is summed here is rotated back by the kernel that merges the splits.
Lengths are read from memory and the grid depends on shapes alone, so that a launch recorded once
serves every decode step.

On a CPU, with queries of 16 bits, queries and weights become int8 and meet the codes as they are:
two planes, 15 bits together, over codes of 8 bits, one over codes of 4 bits. Elsewhere codes are
widened to the type of the queries. Codes lie as products of integers read them (``codes.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.decode import num_splits
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.hadamard.forward import launch_hadamard, rotation
from bitnet_triton.kernels.quantised_attention.codes import GROUP, KeyValueCodes
from bitnet_triton.kernels.quantised_attention.integers import (
    LEAST,
    largest_magnitude,
    power,
    row_max,
    scores_by_bytes,
    scores_by_planes,
    spread,
    values_by_planes,
    weights_in_bytes,
)
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles
from bitnet_triton.runtime.device import smallest_dot

# Rows of queries and heads that a program takes, at most
_MOST_ROWS, _MOST_ROWS_ON_GPU = 32, 16

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_bytes(ptr, stride, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """Load bytes [ROWS, COLS], zeros up to the next powers of two."""
    rows = tl.arange(0, triton.next_power_of_2(ROWS))
    cols = tl.arange(0, triton.next_power_of_2(COLS))
    at = ptr + rows[:, None] * stride + cols[None, :]
    if rows.shape[0] == ROWS and cols.shape[0] == COLS:
        return tl.load(at)
    else:
        return tl.load(at, mask=(rows < ROWS)[:, None] & (cols < COLS)[None, :], other=0)


@triton.jit
def _load_halves(
    ptr, second, stride, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr
) -> tuple:  # fmt: skip
    """Load bytes of codes of the first half of the channels and the second, as int8."""
    if BITS == 4:
        both = _load_bytes(ptr, stride, ROWS, COLS)
        return (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
    else:
        return _load_bytes(ptr, stride, ROWS, COLS), _load_bytes(ptr + second, stride, ROWS, COLS)


@triton.jit
def _matrix(fours, K: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Return codes [K, N] of bytes [K / 4, 4 N], in which four along K stand side by side."""
    return tl.reshape(tl.permute(tl.reshape(fours, (K // 4, N, 4)), (0, 2, 1)), (K, N))


@triton.jit
def _fetch(ptr, QUARTER: tl.constexpr, BYTES: tl.constexpr) -> None:
    """Ask for a quarter of bytes, a line at a time: on a CPU, a load that is not used fetches.

    Asked for all at once they are more than a core can wait for, which keeps it from its work.
    """
    SOME: tl.constexpr = BYTES // 4
    line = tl.arange(0, triton.next_power_of_2(SOME // 64)) * 64
    if line.shape[0] * 64 != SOME:
        line = tl.minimum(line, SOME - 64)
    tl.load(ptr + QUARTER * SOME + line, volatile=True)


@triton.jit
def _load_pair(ptr, at, mask, HALF: tl.constexpr) -> tuple:
    """Load both halves of the channels as float32."""
    low = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(ptr + HALF + at, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _scores_by_floats(
    q_low, q_high, k_low, k_high, s_low, s_high, z_low, z_high, scale, BITS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Return the same with keys in the type of the queries, which are counted as they are."""
    dtype: tl.constexpr = q_low.dtype
    if BITS == 4:
        low = ((k_low.to(tl.float32) - z_low[:, None]) * s_low[:, None]).to(dtype)
        high = ((k_high.to(tl.float32) - z_high[:, None]) * s_high[:, None]).to(dtype)
    else:
        low = k_low.to(dtype)
        high = k_high.to(dtype)
    scores = tl.dot(q_low, low, input_precision="ieee")  # [M, N]
    scores = tl.dot(q_high, high, scores, input_precision="ieee")
    if BITS == 8:
        scores *= scale[None, :]
    return scores


@triton.jit
def _quantised_attention_fwd_kernel(
    # tensors: q [B Tq H D], rotated; codes as in KeyValueCodes; out float32 [B Tq H S D] and
    # lse float32 [B Tq H S], base 2, of S splits; used int32 [B]
    q_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_ptr, v_scale_ptr, out_ptr, lse_ptr, used_ptr,
    # strides, in elements; those of scales of tokens, and of groups
    q_stride_b, q_stride_t, q_stride_h, code_stride_b, code_stride_h,
    k_scale_stride_b, k_scale_stride_h, k_scale_stride_g, v_scale_stride_b, v_scale_stride_h,
    # sizes and scalars
    Tq, capacity, scale_log2, softcap_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    HALF: tl.constexpr = D // 2
    PADDED: tl.constexpr = triton.next_power_of_2(HALF)
    W: tl.constexpr = D * BITS // 8  # bytes of a token
    TILE: tl.constexpr = BLOCK_N * W
    split = tl.program_id(0) % SPLITS
    key_head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1) * GROUP
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    n = tl.minimum(tl.load(used_ptr + b), capacity)

    # row m: query m // GROUP of head m % GROUP of the group
    m = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    t = m // GROUP
    head = key_head * GROUP + m % GROUP
    is_row = t < Tq
    cols = tl.arange(0, PADDED)
    is_value = is_row[:, None] & (cols < HALF)[None, :]
    row_at = batch * q_stride_b + t.to(tl.int64) * q_stride_t + head * q_stride_h
    q_at = row_at[:, None] + cols[None, :]
    q_low = tl.load(q_ptr + q_at, mask=is_value, other=0.0)  # [ROWS, PADDED]
    q_high = tl.load(q_ptr + HALF + q_at, mask=is_value, other=0.0)
    largest_q = tl.full((ROWS,), 1.0, tl.float32)
    if PLANES:
        q_low = q_low.to(tl.float32)
        q_high = q_high.to(tl.float32)
        largest_q = tl.maximum(largest_magnitude(q_low, 1), largest_magnitude(q_high, 1))

    length = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * length
    end = tl.minimum(begin + length, n)
    k_ptr += batch * code_stride_b + key_head * code_stride_h
    v_ptr += batch * code_stride_b + key_head * code_stride_h
    k_scale_ptr += batch * k_scale_stride_b + key_head * k_scale_stride_h
    k_zero_ptr += batch * k_scale_stride_b + key_head * k_scale_stride_h
    v_scale_ptr += batch * v_scale_stride_b + key_head * v_scale_stride_h
    acc_low = tl.zeros((ROWS, PADDED), tl.float32)
    acc_high = tl.zeros((ROWS, PADDED), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    # sums over keys are kept for each place in a tile, and added up at the end
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    offset = tl.zeros((ROWS, BLOCK_N), tl.float32)
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    thresholds = spread(BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        is_key = j < end
        tile = start // BLOCK_N
        k_at = k_ptr + tile.to(tl.int64) * TILE
        v_at = v_ptr + tile.to(tl.int64) * TILE
        group_at = tile * k_scale_stride_g + cols
        v_scale = tl.load(v_scale_ptr + j, mask=is_key, other=0.0)
        # what the other number of bits has; nobody reads these
        s_low, s_high, z_low, z_high = q_low, q_low, q_low, q_low
        k_scale = v_scale
        if BITS == 4:
            s_low, s_high = _load_pair(k_scale_ptr, group_at, cols < HALF, HALF)  # [PADDED]
            z_low, z_high = _load_pair(k_zero_ptr, group_at, cols < HALF, HALF)
        else:
            k_scale = tl.load(k_scale_ptr + j, mask=is_key, other=0.0)
        if PLANES:  # on a CPU
            # ahead of its use, where it would be waited for
            largest_v = tl.maximum(largest_magnitude(v_scale, 0), LEAST)
            _fetch(k_at + TILE, 0, TILE)
        # [PADDED / 4, 4 BLOCK_N] bytes
        k_low, k_high = _load_halves(
            k_at, HALF * BLOCK_N, 4 * BLOCK_N, HALF // 4, 4 * BLOCK_N, BITS
        )
        if PLANES:
            _fetch(k_at + TILE, 1, TILE)
        k_low = _matrix(k_low, PADDED, BLOCK_N)
        k_high = _matrix(k_high, PADDED, BLOCK_N)
        if PLANES and BITS == 4:
            scores = scores_by_bytes(q_low, q_high, k_low, k_high, s_low, s_high, z_low, z_high)
        elif PLANES:
            scores = scores_by_planes(q_low, q_high, largest_q, k_low, k_high, k_scale)
        else:
            scores = _scores_by_floats(
                q_low, q_high, k_low, k_high, s_low, s_high, z_low, z_high, k_scale, BITS
            )
        if PLANES:
            _fetch(k_at + TILE, 2, TILE)
        if softcap_log2 is not None:
            scores = libdevice.tanh(scores * scale_log2)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        if PLANES:
            _fetch(k_at + TILE, 3, TILE)
        new_top = tl.maximum(top, row_max(scores, PLANES))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * factor
        if PLANES and BITS == 4:
            weights = power(scores * factor - pivot[:, None])
        else:
            weights = tl.exp2(scores * factor - pivot[:, None])
        shrink = tl.exp2(top * factor - pivot)
        top = new_top
        total = total * shrink[:, None] + weights
        if PLANES:
            _fetch(v_at + TILE, 0, TILE)
            _fetch(v_at + TILE, 1, TILE)
        # [BLOCK_N / 4, 4 PADDED] bytes
        v_low, v_high = _load_halves(v_at, 4 * HALF, 4 * W, BLOCK_N // 4, 4 * HALF, BITS)
        v_low = _matrix(v_low, BLOCK_N, PADDED)
        v_high = _matrix(v_high, BLOCK_N, PADDED)
        if PLANES:
            w = weights * v_scale[None, :]
            if BITS == 4:
                codes, step, rounded = weights_in_bytes(w, thresholds)
                _fetch(v_at + TILE, 2, TILE)
                offset = offset * shrink[:, None] + rounded
                _fetch(v_at + TILE, 3, TILE)
                low = tl.dot(codes, v_low, out_dtype=tl.int32).to(tl.float32) * step
                high = tl.dot(codes, v_high, out_dtype=tl.int32).to(tl.float32) * step
            else:
                _fetch(v_at + TILE, 2, TILE)
                _fetch(v_at + TILE, 3, TILE)
                low, high = values_by_planes(w, largest_v, v_low, v_high)
            acc_low = acc_low * shrink[:, None] + low
            acc_high = acc_high * shrink[:, None] + high
        else:
            dtype: tl.constexpr = q_low.dtype
            ZERO: tl.constexpr = 8 if BITS == 4 else 0
            low = ((v_low.to(tl.float32) - ZERO) * v_scale[:, None]).to(dtype)
            high = ((v_high.to(tl.float32) - ZERO) * v_scale[:, None]).to(dtype)
            acc_low *= shrink[:, None]
            acc_high *= shrink[:, None]
            w = weights.to(dtype)
            acc_low = tl.dot(w, low, acc_low, input_precision="ieee")  # [ROWS, PADDED]
            acc_high = tl.dot(w, high, acc_high, input_precision="ieee")
    total = tl.sum(total, axis=1)
    if PLANES and BITS == 4:
        shift = 8.0 * tl.sum(offset, axis=1)
        acc_low -= shift[:, None]
        acc_high -= shift[:, None]

    row = (batch * Tq + t) * H + head
    inverse = 1.0 / tl.where(total > 0, total, 1.0)[:, None]
    at = out_ptr + (row * SPLITS + split)[:, None] * D + cols[None, :]
    tl.store(at, acc_low * inverse, mask=is_value)
    tl.store(at + HALF, acc_high * inverse, mask=is_value)
    tl.store(lse_ptr + row * SPLITS + split, top * factor + tl.log2(total), mask=is_row)


@triton.jit
def _quantised_attention_merge_kernel(
    # tensors: parts float32 [B Tq H S D] and part_lse [B Tq H S], base 2; matrix float32 [D D] or
    # None; what attention over other keys has given, more [B Tq H D] and more_lse [B H Tq], or
    # None; out [B Tq H D]; lse [B H Tq]
    parts_ptr, part_lse_ptr, matrix_ptr, more_ptr, more_lse_ptr, out_ptr, lse_ptr,
    # sizes
    Tq, H,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_S: tl.constexpr = triton.next_power_of_2(SPLITS)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    SOME: tl.constexpr = 16  # values that are rotated at a time, to spare registers
    t = tl.program_id(0) // H
    head = tl.program_id(0) % H
    batch = tl.program_id(1).to(tl.int64)
    row = (batch * Tq + t) * H + head
    dims = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    is_split = s < SPLITS
    lses = tl.load(part_lse_ptr + row * SPLITS + s, mask=is_split, other=float("-inf"))
    top = tl.max(lses, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lses - pivot)
    total = tl.sum(weights, 0)
    weights /= tl.where(total > 0, total, 1.0)
    at = parts_ptr + (row * SPLITS + s)[:, None] * D
    if matrix_ptr is None:
        is_part = is_split[:, None] & (dims < D)[None, :]
        parts = tl.load(at + dims[None, :], mask=is_part, other=0.0)  # [S, BLOCK_D]
        out = tl.sum(parts * weights[:, None], axis=0)
    else:
        out = tl.zeros((BLOCK_D,), tl.float32)
        for k in range(0, D, SOME):
            some = k + tl.arange(0, SOME)
            is_part = is_split[:, None] & (some < D)[None, :]
            parts = tl.load(at + some[None, :], mask=is_part, other=0.0)
            x = tl.sum(parts * weights[:, None], axis=0)  # [SOME]
            is_value = (some < D)[:, None] & (dims < D)[None, :]
            matrix = tl.load(
                matrix_ptr + some[:, None] * D + dims[None, :], mask=is_value, other=0.0
            )  # [SOME, BLOCK_D]
            out += tl.sum(matrix * x[:, None], axis=0)
    lse = (top + tl.log2(total)) * _LN_2
    lse_at = (batch * H + head) * Tq + t
    if more_ptr is not None:
        other = tl.load(more_lse_ptr + lse_at)
        larger = tl.maximum(lse, other)
        pivot = tl.where(larger == float("-inf"), 0.0, larger)
        mine = tl.exp(lse - pivot)
        theirs = tl.exp(other - pivot)
        both = mine + theirs
        more = tl.load(more_ptr + row * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        out = (out * mine + more * theirs) / tl.where(both > 0, both, 1.0)
        lse = larger + tl.log(both)
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + lse_at, lse)


def _num_splits(keys: int, device: torch.device) -> int:
    """Return among how many programs to divide the keys of a head of keys.

    On a CPU they are twice as long as over keys and values that are kept as they are: the float32
    that a program leaves for each head weighs more beside codes.
    """
    return num_splits(cdiv(keys, 2) if smallest_dot(device) == 1 else keys, device)


def launch_quantised_attention(
    q: Tensor,
    codes: KeyValueCodes,
    used: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to codes, without checks and only by launches: it can be captured.

    Arguments are those of ``quantised_attention``; q has contiguous heads.

    Args:
        q: [B Tq H D].
        codes: of keys and values.
        used: int32 [B].
        scale: multiplies the scores.
        softcap: bounds them.
        more: out [B Tq H D] and lse [B H Tq] of other keys, contiguous, to be merged with.
    """
    (B, Tq, H, D), Hk = q.shape, codes.keys.shape[1]
    on_cpu = smallest_dot(q.device) == 1
    planes, out_dtype = on_cpu and q.dtype != torch.float32, q.dtype
    matrix = rotation(D, q.device) if codes.is_rotated else None
    if matrix is not None:
        # the dtype of products; planes are made of float32
        dtype = torch.float32 if planes else q.dtype
        q = launch_hadamard(q.reshape(-1, D), matrix, dtype).view(B, Tq, H, D)
    group = H // Hk
    most = _MOST_ROWS if on_cpu else _MOST_ROWS_ON_GPU
    rows = max(min(triton.next_power_of_2(Tq * group), most), smallest_dot(q.device))
    row_tiles = cdiv(Tq * group, rows)
    splits = _num_splits(codes.capacity, q.device) if row_tiles == 1 else 1
    parts = torch.empty((B, Tq, H, splits, D), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((B, Tq, H, splits), dtype=torch.float32, device=q.device)
    out = torch.empty((B, Tq, H, D), dtype=out_dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    k_scale = codes.key_scale
    launch(_quantised_attention_fwd_kernel, (splits * row_tiles, Hk, B))(
        q, codes.keys, k_scale, k_scale if codes.key_zero is None else codes.key_zero,
        codes.values, codes.value_scale, parts, part_lse, used,
        *q.stride()[:3], *codes.keys.stride()[:2],
        *k_scale.stride()[:2], k_scale.stride(2), *codes.value_scale.stride()[:2],
        Tq, codes.capacity, *score_factors(scale, softcap),
        GROUP=group, D=D, BITS=codes.bits, PLANES=planes, SPLITS=splits, ROWS=rows, BLOCK_N=GROUP,
        **tiles("quantised_attention_fwd", D, q.device), **dependent(q.device),
    )  # fmt: skip
    more_out, more_lse = (None, None) if more is None else more
    launch(_quantised_attention_merge_kernel, (Tq * H, B))(
        parts, part_lse, matrix, more_out, more_lse, out, lse,
        Tq, H,
        D=D, SPLITS=splits,
        **tiles("quantised_attention_merge", D, q.device), **dependent(q.device),
    )  # fmt: skip
    return out, lse
