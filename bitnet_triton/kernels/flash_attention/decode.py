"""Triton attention for a few queries and many keys: bound by reading the keys and values once.

One program reads one split of the visible keys of one key head, for all queries and all query heads
that share it (Flash-Decoding, split-KV); a second kernel merges the splits. Lengths are read from
memory and the grid depends on shapes alone, so that a launch recorded once serves every decode
step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import (
    accumulate,
    load_rows,
    raw_scores,
    softmax_step,
    store_rows,
)
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.bands import OPEN
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

MOST_QUERIES = 16

# Keys of a split at full length on a CPU, and on a GPU, which has more to occupy; and the most
# splits: more than that merge slowly
_KEYS_OF_SPLIT, _KEYS_OF_SPLIT_ON_GPU = 512, 128
_MOST_SPLITS = 64

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _flash_attention_decode_kernel(
    # tensors: q [B Tq H D]; k [B Tk Hk D]; v [B Tk Hk DV]; out [B Tq H S DV]; lse [B Tq H S], of
    # S splits; lse in base 2, or as promised to callers where S is 1
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # int32 [B] or None: the first valid key, one past the last one, the first row that sees all
    leftpad_ptr, used_ptr, dense_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    # sizes and scalars; sinks and dense_from are None without
    Tq, Tk, left, right, sinks, dense_from, scale_log2, softcap_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    split = tl.program_id(0)
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    first = batch * 0
    n = Tk
    if used_ptr is not None:
        n = tl.minimum(tl.load(used_ptr + b), Tk)
    if leftpad_ptr is not None:
        first = tl.minimum(tl.load(leftpad_ptr + b), n).to(tl.int64)
        n -= first.to(tl.int32)

    # row m of the tile: query m // GROUP of head m % GROUP of the group
    m = tl.arange(0, ROWS)
    t = m // GROUP
    head = key_head * GROUP + m % GROUP
    is_row = t < Tq
    p = t + n - Tq
    low = tl.maximum(p - left, 0)
    high = tl.minimum(p + right + 1, n)
    if dense_ptr is not None:
        dense_from = tl.load(dense_ptr + b)
    if dense_from is not None:
        low = tl.where(p >= dense_from, 0, low)
        high = tl.where(p >= dense_from, tl.minimum(p + 1, n) if CAUSAL else n, high)
    sink_end = 0 * p
    if sinks is not None:
        sink_end = tl.minimum(tl.minimum(p + 1, n) if CAUSAL else n, sinks) + sink_end
    if leftpad_ptr is not None:
        # queries that stand before the first valid key are padding
        high = tl.where(p >= 0, high, 0)
        sink_end = tl.where(p >= 0, sink_end, 0)
    start = tl.min(tl.where(is_row, low, n), 0)
    end = tl.max(tl.where(is_row, tl.maximum(high, sink_end), 0), 0)

    # a split of start .. end for every program, and the sinks in front of it for the first one
    length = tl.cdiv(tl.maximum(end - start, 0), SPLITS)
    begin = start + split * length
    end = tl.minimum(begin + length, end)
    ahead = tl.where(split == 0, tl.minimum(tl.max(sink_end, 0), start), 0)
    tiles_ahead = tl.cdiv(ahead, BLOCK_N)

    row_at = t.to(tl.int64) * q_stride_t + head * q_stride_h
    q = load_rows(q_ptr + batch * q_stride_b, row_at, 1, is_row, D, BLOCK_D)  # [ROWS, BLOCK_D]

    k_ptr += batch * k_stride_b + first * k_stride_t + key_head * k_stride_h
    v_ptr += batch * v_stride_b + first * v_stride_t + key_head * v_stride_h
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(tiles_ahead + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)):
        is_ahead = i < tiles_ahead
        at = tl.where(is_ahead, i * BLOCK_N, begin + (i - tiles_ahead) * BLOCK_N)
        j = at + tl.arange(0, BLOCK_N)
        is_key = j < tl.where(is_ahead, ahead, end)
        k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, j, v_stride_t, is_key, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [ROWS, BLOCK_N]
        visible = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if sinks is not None:
            visible = visible | (j[None, :] < sink_end[:, None])
        scores = tl.where(visible & is_key[None, :], scores, float("-inf"))
        if ROWS <= 4:
            # on a CPU: values are widened as they are read, nothing is packed, weights keep float32
            weights, shrink, top, total = softmax_step(top, total, scores, factor)
            products = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
            acc = acc * shrink[:, None] + products  # [ROWS, BLOCK_DV]
        else:
            acc, top, total = accumulate(acc, top, total, scores, factor, v)

    row = (batch * Tq + t) * H + head
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ptr, row * SPLITS + split, DV, out, is_row, DV, BLOCK_DV)
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    lse = top * factor + tl.log2(total)
    if SPLITS == 1:
        tl.store(lse_ptr + (batch * H + head) * Tq + t, lse * _LN_2, mask=is_row)
    else:
        tl.store(lse_ptr + row * SPLITS + split, lse, mask=is_row)


@triton.jit
def _flash_attention_decode_merge_kernel(
    # tensors: parts [B Tq H S DV] and part_lse [B Tq H S], base 2, float32; out [B Tq H DV];
    # lse [B H Tq]
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr,
    # sizes
    Tq, H,
    # compile-time
    DEPENDENT: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_S: tl.constexpr = triton.next_power_of_2(SPLITS)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DV)
    t = tl.program_id(0) // H
    head = tl.program_id(0) % H
    batch = tl.program_id(1).to(tl.int64)
    row = (batch * Tq + t) * H + head
    s = tl.arange(0, BLOCK_S)
    lses = tl.load(part_lse_ptr + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(lses, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lses - pivot)
    total = tl.sum(weights, 0)
    # parts of splits without a key are zeros
    parts = load_rows(parts_ptr, row * SPLITS + s, DV, s < SPLITS, DV, BLOCK_DV)  # [S, BLOCK_DV]
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    dims = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row * DV + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DV)
    tl.store(lse_ptr + (batch * H + head) * Tq + t, (top + tl.log2(total)) * _LN_2)


def decode_objection(q: Tensor, k: Tensor, mask: Mask) -> str | None:
    """Say why ``launch_decode`` cannot compute this; None when it can.

    Args:
        q: [B Tq H D].
        k: [B Tk Hk D].
        mask: without regard to its values in tensors.
    """
    if q.shape[1] > MOST_QUERIES:
        return f"decoding takes at most {MOST_QUERIES} queries"
    for field in ("pattern", "global_tokens"):
        if getattr(mask, field) is not None:
            return f"decoding has no `{field}`"
    return None if mask.dilations == (1,) else "decoding has no `dilation`"


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with a few queries, without checks and only by launches: it can be captured.

    Arguments are those of ``flash_attention``; k and v may be views of any strides whose last
    dimension is contiguous, longer than what ``seqused_k`` says is valid.

    Returns:
        out [B Tq H Dv] in the dtype of ``q`` and lse [B H Tq] in float32.
    """
    (B, Tq, H, D), (Tk, Hk), DV = q.shape, k.shape[1:3], v.shape[-1]
    splits = _num_splits(Tk, mask, q.device)
    out = torch.empty((B, Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((B, Tq, H, splits, DV), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((B, Tq, H, splits), dtype=torch.float32, device=q.device)
    dense = mask.dense_from
    scale_log2, softcap_log2 = score_factors(scale, softcap)
    rows = triton.next_power_of_2(Tq * (H // Hk))
    launch(_flash_attention_decode_kernel, (splits, Hk, B))(
        q, k, v, parts, part_lse,
        leftpad_k, seqused_k, dense if isinstance(dense, Tensor) else None,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Tq, Tk,
        OPEN if mask.window is None else mask.window - 1,
        0 if mask.causal else OPEN if mask.window_right is None else mask.window_right,
        mask.sinks or None,
        None if isinstance(dense, Tensor) else dense,
        scale_log2, softcap_log2,
        GROUP=H // Hk, D=D, DV=DV, CAUSAL=mask.causal, SPLITS=splits,
        ROWS=max(rows, smallest_dot(q.device)),
        **tiles("flash_attention_decode", head_size(max(D, DV), q.dtype), q.device),
        **dependent(q.device),
    )  # fmt: skip
    if splits > 1:
        launch_merge(parts, part_lse, out, lse)
    return out, lse


def launch_merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge parts [B Tq H S DV] and part_lse [B Tq H S], base 2, into out and lse."""
    B, Tq, H, splits, DV = parts.shape
    launch(_flash_attention_decode_merge_kernel, (Tq * H, B))(
        parts, part_lse, out, lse, Tq, H, DV=DV, SPLITS=splits,
        **tiles("flash_attention_decode_merge", DV, out.device), **dependent(out.device),
    )  # fmt: skip


def _num_splits(Tk: int, mask: Mask, device: torch.device) -> int:
    """Divide the keys that a query may see; by shapes alone, so that a row decides for itself."""
    keys = Tk
    if mask.window is not None and mask.causal and mask.dense_from is None:
        keys = min(keys, mask.window)
    return num_splits(keys, device)


def num_splits(keys: int, device: torch.device) -> int:
    """Return among how many programs to divide the keys that a query sees at most."""
    keys_of_split = _KEYS_OF_SPLIT if smallest_dot(device) == 1 else _KEYS_OF_SPLIT_ON_GPU
    return min(cdiv(keys, keys_of_split), _MOST_SPLITS)
