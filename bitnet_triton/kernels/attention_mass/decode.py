"""Triton kernel of what one new query gives to each key: the scores of a decode step.

One program goes over one split of the keys of one key head, for all query heads that share it.
Lengths are read from memory and the grid depends on shapes alone, so that a launch recorded once
serves every step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows, score_tile
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.flash_attention.decode import num_splits
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_mass_decode_kernel(
    # tensors: q [B 1 H D]; k [B Tk Hk D]; lse [B H 1]; mass [B Hk Tk]
    q_ptr, k_ptr, lse_ptr, mass_ptr,
    # int32 [B]: the first valid key; one past the last one, which is the new token's own
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_h, k_stride_b, k_stride_t, k_stride_h, mass_stride_b, mass_stride_h,
    # sizes and scalars
    Tk, length, scale_log2,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    key_head = tl.program_id(1)
    H = tl.num_programs(1) * GROUP
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    used = tl.minimum(tl.load(used_ptr + b), Tk)
    first = tl.load(leftpad_ptr + b)
    begin = tl.program_id(0) * length
    end = tl.minimum(begin + length, used)

    m = tl.arange(0, ROWS)
    is_row = m < GROUP
    head = key_head * GROUP + m
    q = load_rows(q_ptr + batch * q_stride_b, head, q_stride_h, is_row, D, BLOCK_D)  # [ROWS, D]
    lse = tl.load(lse_ptr + batch * H + head, mask=is_row, other=float("inf"))
    # rows that read nothing give nothing
    pivot = tl.where(lse > float("-inf"), lse * _LOG2_E, float("inf"))

    k_ptr += batch * k_stride_b + key_head * k_stride_h
    mass_ptr += batch * mass_stride_b + key_head * mass_stride_h
    for at in range(begin, end, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        is_key = (j >= first) & (j < end)
        k = load_rows(k_ptr, j, k_stride_t, is_key, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores, _ = score_tile(q, k, scale_log2, None)  # [ROWS, BLOCK_N]
        given = tl.sum(tl.exp2(scores - pivot[:, None]), axis=0)
        tl.store(mass_ptr + j, given, mask=is_key)


def launch_decode_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    scale: float,
    leftpad_k: Tensor,
    seqused_k: Tensor,
) -> None:
    """Write what one query a row gives to each key, without checks and only by launches.

    Args:
        q: [B 1 H D].
        k: [B Tk Hk D], longer than what ``seqused_k`` says is valid.
        lse: float32 [B H 1], of these queries over these keys.
        mass: float32 [B Hk Tk], summed over the heads that share a key; valid keys are written.
        scale: multiplies the scores.
        leftpad_k: int32 [B].
        seqused_k: int32 [B].
    """
    (B, _, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    splits = num_splits(Tk, q.device)
    block = tiles("attention_mass_decode", head_size(D, q.dtype), q.device)
    length = cdiv(cdiv(Tk, splits), block["BLOCK_N"]) * block["BLOCK_N"]
    launch(_attention_mass_decode_kernel, (splits, Hk, B))(
        q, k, lse, mass, leftpad_k, seqused_k,
        q.stride(0), q.stride(2), *k.stride()[:3], *mass.stride()[:2],
        Tk, length, score_factors(scale, None)[0],
        GROUP=H // Hk, D=D, ROWS=max(triton.next_power_of_2(H // Hk), smallest_dot(q.device)),
        **block, **dependent(q.device),
    )  # fmt: skip
