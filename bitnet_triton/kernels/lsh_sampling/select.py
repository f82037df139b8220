"""Triton scores of packed signs: in how many bits the codes of keys are those of queries.

One program takes a tile of the rows of one key head, for all query heads of its group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles


@triton.jit
def _count_bits(x) -> tl.tensor:
    """Count the bits that are set among the lowest 16."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit
def _sign_scores_kernel(
    # tensors: own int16 [B H W], of queries; codes int16 [B Hk W T]; scores int32 [B Hk T]
    own_ptr, codes_ptr, scores_ptr,
    # strides, in elements
    codes_stride_b, codes_stride_h, codes_stride_w,
    # sizes
    T,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    kv = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    head = batch * tl.num_programs(1) + kv
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes_ptr += batch * codes_stride_b + kv * codes_stride_h
    own_ptr += head * GROUP * WORDS
    differ = tl.zeros((BLOCK_N,), tl.int32)
    for word in range(WORDS):
        at = codes_ptr + word * codes_stride_w + rows
        codes = tl.load(at, mask=rows < T, other=0).to(tl.int32)
        for g in tl.static_range(GROUP):
            own = tl.load(own_ptr + g * WORDS + word).to(tl.int32)
            differ += _count_bits((codes ^ own) & 0xFFFF)
    tl.store(scores_ptr + head * T + rows, 16 * WORDS * GROUP - differ, mask=rows < T)


def launch_sign_scores(own: Tensor, codes: Tensor) -> Tensor:
    """Return how many bits codes [B Hk W T] share with own [B H W], summed over a group.

    Both are int16; codes have contiguous rows. The result is int32 [B Hk T].
    """
    B, Hk, W, T = codes.shape
    scores = torch.empty((B, Hk, T), dtype=torch.int32, device=codes.device)
    config = tiles("sign_scores", T, codes.device)
    launch(_sign_scores_kernel, (cdiv(T, config["BLOCK_N"]), Hk, B))(
        own, codes, scores, *codes.stride()[:3], T,
        GROUP=own.shape[1] // Hk, WORDS=W, **config, **dependent(codes.device),
    )  # fmt: skip
    return scores
