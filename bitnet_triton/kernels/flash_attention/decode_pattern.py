"""Triton attention for one query of a row under a pattern: bound by reading the keys it sees.

The keys that a query sees are numbered by u: first those that lie apart, ahead of the others (the
first keys of a text, strides or summaries of earlier blocks, listed tokens), then the near ones,
which stand ``dilation`` apart up to the query. One program reads one split of u for all query heads
of a key head; the merge is that of ``decode.py``. Lengths are read from memory and the grid depends
on shapes alone, so that a launch recorded once serves every decode step.
"""

from __future__ import annotations

import functools
import math

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
from bitnet_triton.kernels.flash_attention.decode import launch_merge, num_splits
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.operands import SinkQuery, score_factors
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _is_regular(
    j, p, start, reach,
    DILATION: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SUMMARY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return which keys at positions j the window and the pattern show, without any list."""
    offset = p - j
    seen = (offset >= 0) & (offset <= reach) & (offset % DILATION == 0)
    if BLOCK is not None:
        shown = j >= start
        if STRIDE is not None:
            shown = shown | (offset % BLOCK == 0)
        elif SUMMARY is not None:
            shown = shown | (j % BLOCK >= BLOCK - SUMMARY)
        seen = seen & shown
    return seen


@triton.jit
def _ahead_keys(
    u, p, start, first_keys, far, tokens_ptr, tokens, reach, sinks,
    DILATION: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SUMMARY: tl.constexpr,
) -> tuple:  # fmt: skip
    """Return where the keys number u stand that lie ahead, and which of them are seen.

    Those that the window or the pattern shows anyway are read there.
    """
    j = u
    is_listed = u < first_keys
    if STRIDE is not None:
        j = tl.where(is_listed, j, p - STRIDE * (first_keys + far - u))
    elif SUMMARY is not None:
        s = u - first_keys
        j = tl.where(is_listed, j, (s // SUMMARY + 1) * BLOCK - SUMMARY + s % SUMMARY)
    regular = _is_regular(j, p, start, reach, DILATION, BLOCK, STRIDE, SUMMARY)
    seen = regular != is_listed
    if tokens_ptr is not None:
        at = u - first_keys - far
        is_token = (at >= 0) & (at < tokens)
        token = tl.load(tokens_ptr + at, mask=is_token, other=0)
        regular = _is_regular(token, p, start, reach, DILATION, BLOCK, STRIDE, SUMMARY)
        is_seen = (token <= p) & (regular == 0)
        if sinks is not None:
            is_seen = is_seen & (token >= sinks)
        j = tl.where(is_token, token, j)
        seen = tl.where(is_token, is_seen, seen)
    return j, seen


@triton.jit
def _is_token(p, tokens_ptr, tokens, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Count how often position p is in a list."""
    found = p * 0
    for t in range(0, tokens, BLOCK_N):
        at = t + tl.arange(0, BLOCK_N)
        token = tl.load(tokens_ptr + at, mask=at < tokens, other=-1)
        found += tl.sum((token == p).to(tl.int32), axis=0)
    return found


@triton.jit
def _turned_rows(
    heads_ptr, heads_stride_h, cos_ptr, sin_ptr, angle_stride, position, rows, is_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return heads [ROWS, BLOCK_D] rotated to a position, rounded as ``rotary_and_store`` does."""
    dims = tl.arange(0, BLOCK_D)
    is_low = dims < D // 2
    is_value = is_row[:, None] & (dims < D)[None, :]
    at = heads_ptr + rows.to(tl.int64)[:, None] * heads_stride_h
    across = tl.where(is_low, dims + D // 2, dims - D // 2)
    x = tl.load(at + dims[None, :], mask=is_value, other=0.0)  # [ROWS, BLOCK_D]
    y = tl.load(at + across[None, :], mask=is_value, other=0.0)
    angle = position.to(tl.int64) * angle_stride + dims
    cos = tl.load(cos_ptr + angle, mask=dims < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    sin = tl.load(sin_ptr + angle, mask=dims < D, other=0.0).to(tl.float32)
    sin = tl.where(is_low, -sin, sin)
    straight = (x.to(tl.float32) * cos[None, :]).to(x.dtype)
    crossed = (y.to(tl.float32) * sin[None, :]).to(x.dtype)
    return (straight.to(tl.float32) + crossed.to(tl.float32)).to(x.dtype)


@triton.jit
def _add_keys(
    acc, top, total, q, k_ptr, v_ptr, j, k_stride_t, v_stride_t, is_seen, scale_log2, softcap_log2,
    D: tl.constexpr, DV: tl.constexpr,
) -> tuple:  # fmt: skip
    """Take the keys at j, where they are seen, into what all rows have summed."""
    k = load_rows(k_ptr, j, k_stride_t, is_seen, D, triton.next_power_of_2(D))  # [N, BLOCK_D]
    v = load_rows(v_ptr, j, v_stride_t, is_seen, DV, triton.next_power_of_2(DV))  # [N, BLOCK_DV]
    scores, factor = raw_scores(q, k, scale_log2, softcap_log2)  # [ROWS, N]
    scores = tl.where(is_seen[None, :], scores, float("-inf"))
    if q.shape[0] <= 4:
        # on a CPU: values are widened as they are read, nothing is packed, weights keep float32
        weights, shrink, top, total = softmax_step(top, total, scores, factor)
        products = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        return acc * shrink[:, None] + products, top, total  # [ROWS, BLOCK_DV]
    else:
        return accumulate(acc, top, total, scores, factor, v)


@triton.jit
def _flash_attention_decode_pattern_kernel(
    # tensors: q [B 1 H D], contiguous; k [B Tk Hk D]; v [B Tk Hk DV]; out [B 1 H S DV] and
    # lse [B 1 H S], of S splits; lse in base 2, or as promised to callers where S is 1
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # int32 [B] or None: the first valid key, one past the last one; int32 [tokens] or None
    leftpad_ptr, used_ptr, tokens_ptr,
    # or None: the query before its rotation [B 1 H D], cos and sin [P D], positions int32 [B]
    heads_ptr, cos_ptr, sin_ptr, positions_ptr,
    # strides, in elements
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    heads_stride_b, heads_stride_h, angle_stride,
    # sizes and scalars: how far away a key of the window may be; sinks is None without
    Tk, reach, tokens, last, sinks, scale_log2, softcap_log2,
    # compile-time: of the mask, None without (a model has few masks, and divides by these)
    DILATION: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SUMMARY: tl.constexpr,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
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
    p = n - 1 + 0 * b

    # the near keys: ``near`` of them from ``low`` on, ``step`` apart; and those ahead of them
    step = DILATION + 0 * p
    start = 0 * p
    far = 0 * p
    if BLOCK is not None:
        if STRIDE is not None:
            start = tl.maximum(p - BLOCK + 1, 0)
            far = tl.maximum(tl.minimum(p, reach), 0) // STRIDE
        else:
            start = tl.maximum(p, 0) // BLOCK * BLOCK
            if SUMMARY is not None:
                far = start // BLOCK * SUMMARY
    near = tl.minimum(p - start, reach) // DILATION + 1
    first_keys = 0 * p
    if sinks is not None:
        # without gaps, the near keys are all of those from their first one on
        low = tl.where(step == 1, p + 1 - near, p + 1)
        first_keys = tl.minimum(sinks, tl.maximum(low, 0))
    ahead = first_keys + far
    if tokens_ptr is not None:
        ahead += tokens
    sees_all = p < 0
    if tokens_ptr is not None:
        sees_all = sees_all | (_is_token(p, tokens_ptr, tokens, BLOCK_N) > 0)
    step = tl.where(sees_all, 1, step)
    ahead = tl.where(sees_all, 0, ahead)
    near = tl.where(sees_all, p + 1, near)
    low = p - step * (near - 1)

    # a split of u for every program; no tile has keys of both kinds
    length = tl.cdiv(ahead + near, SPLITS)
    begin = split * length
    end = tl.minimum(begin + length, ahead + near)

    m = tl.arange(0, ROWS)
    head = key_head * GROUP + m
    is_row = m < GROUP
    q = load_rows(q_ptr, batch * H + head, D, is_row, D, BLOCK_D)  # [ROWS, BLOCK_D]
    k_ptr += batch * k_stride_b + first * k_stride_t + key_head * k_stride_h
    v_ptr += batch * v_stride_b + first * v_stride_t + key_head * v_stride_h
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    if STRIDE is not None or SUMMARY is not None or sinks is not None or tokens_ptr is not None:
        far_q = q
        if positions_ptr is not None:
            position = tl.maximum(tl.minimum(tl.load(positions_ptr + b), last), 0)
            far_q = _turned_rows(
                heads_ptr + batch * heads_stride_b, heads_stride_h, cos_ptr, sin_ptr, angle_stride,
                position, head, is_row, D, BLOCK_D,
            )  # fmt: skip
        ahead_end = tl.minimum(end, ahead)
        for t in range(begin, ahead_end, BLOCK_N):
            j, is_seen = _ahead_keys(
                t + lanes, p, start, first_keys, far, tokens_ptr, tokens,
                reach, sinks, DILATION, BLOCK, STRIDE, SUMMARY,
            )  # fmt: skip
            is_seen = is_seen & (t + lanes < ahead_end)
            acc, top, total = _add_keys(
                acc, top, total, far_q, k_ptr, v_ptr, j, k_stride_t, v_stride_t, is_seen,
                scale_log2, softcap_log2, D, DV,
            )  # fmt: skip
    for t in range(tl.maximum(begin, ahead), end, BLOCK_N):
        j = low + (t - ahead + lanes) * step
        acc, top, total = _add_keys(
            acc, top, total, q, k_ptr, v_ptr, j, k_stride_t, v_stride_t, t + lanes < end,
            scale_log2, softcap_log2, D, DV,
        )  # fmt: skip

    row = batch * H + head
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out_ptr, row * SPLITS + split, DV, out, is_row, DV, BLOCK_DV)
    factor = scale_log2 if softcap_log2 is None else softcap_log2
    lse = top * factor + tl.log2(total)
    if SPLITS == 1:
        lse *= _LN_2
    tl.store(lse_ptr + row * SPLITS + split, lse, mask=is_row)


def decode_pattern_objection(q: Tensor, k: Tensor, mask: Mask) -> str | None:
    """Say why ``launch_decode_pattern`` cannot compute this; None when it can.

    Args:
        q: [B Tq H D].
        k: [B Tk Hk D].
        mask: without regard to its values in tensors.
    """
    if q.shape[1] != 1:
        return "decoding with a pattern takes one query"
    if isinstance(mask.global_tokens, Tensor):
        return "decoding takes `global_tokens` as positions, not as a tensor"
    if mask.dense_from is not None:
        return "decoding with a pattern has no `dense_from`"
    return None if len(set(mask.dilations)) == 1 else "decoding has one `dilation` for all heads"


def launch_decode_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sink_query: SinkQuery | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with one query, without checks and only by launches: it can be captured.

    Arguments are those of ``flash_attention``; q is contiguous, k and v may be views of any strides
    whose last dimension is contiguous, longer than what ``seqused_k`` says is valid.

    With ``sink_query`` and the ``positions`` int32 [B] of the query, ``mask`` has a window and
    sinks and nothing else, and sinks that have left the window meet that query instead.

    Returns:
        out [B 1 H Dv] in the dtype of ``q`` and lse [B H 1] in float32.
    """
    (B, _, H, D), (Tk, Hk), DV = q.shape, k.shape[1:3], v.shape[-1]
    splits = num_splits(_most_keys(Tk, mask), q.device)
    out = torch.empty((B, 1, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, 1), dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((B, 1, H, splits, DV), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((B, 1, H, splits), dtype=torch.float32, device=q.device)
    listed, dilation = _tokens(mask, q.device), mask.dilations[0]
    heads, cos, sin, last = sink_query or (None, None, None, 0)
    launch(_flash_attention_decode_pattern_kernel, (splits, Hk, B))(
        q, k, v, parts, part_lse,
        leftpad_k, seqused_k, listed,
        heads, cos, sin, positions,
        *k.stride()[:3], *v.stride()[:3],
        0 if heads is None else heads.stride(0), 0 if heads is None else heads.stride(2),
        0 if cos is None else cos.stride(0),
        Tk, OPEN if mask.window is None else min(mask.window * dilation - 1, OPEN),
        0 if listed is None else listed.shape[0], last, mask.sinks or None,
        *score_factors(scale, softcap),
        DILATION=dilation, BLOCK=mask.block, STRIDE=_stride(mask),
        SUMMARY=mask.summary if mask.pattern == "fixed" else None,
        GROUP=H // Hk, D=D, DV=DV, SPLITS=splits,
        ROWS=max(triton.next_power_of_2(H // Hk), smallest_dot(q.device)),
        **tiles("flash_attention_decode_pattern", head_size(max(D, DV), q.dtype), q.device),
        **dependent(q.device),
    )  # fmt: skip
    if splits > 1:
        launch_merge(parts, part_lse, out, lse)
    return out, lse


def _stride(mask: Mask) -> int | None:
    """Return how far the keys before the window of "strided" stand apart."""
    if mask.pattern != "strided":
        return None
    assert mask.block is not None
    return math.lcm(mask.block, mask.dilations[0])


def _most_keys(Tk: int, mask: Mask) -> int:
    """Return how many keys a query sees at most, by shapes alone.

    Global queries see more: they are few.
    """
    block, dilation = mask.block or Tk, mask.dilations[0]
    keys = min(cdiv(min(block, Tk), dilation), mask.window or Tk)
    stride = _stride(mask)
    if stride is not None:
        keys += Tk // stride
    elif mask.pattern == "fixed":
        keys += Tk // block * mask.summary
    tokens = mask.global_tokens
    keys += mask.sinks + (len(tokens) if isinstance(tokens, tuple) else 0)
    return min(keys, Tk)


def _tokens(mask: Mask, device: torch.device) -> Tensor | None:
    """Return the global tokens as int32 [tokens]; None without."""
    tokens = mask.global_tokens
    assert not isinstance(tokens, Tensor)
    return None if not tokens else _on_device(tokens, device)


@functools.cache
def _on_device(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy a list once: a GPU cannot take one while a graph is recorded, and graphs keep it."""
    return torch.tensor(sorted(set(tokens)), dtype=torch.int32, device=device)
