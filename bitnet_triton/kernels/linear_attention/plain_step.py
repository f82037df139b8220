"""Triton kernels around the recurrence of one token in the plain forms: features, normaliser.

They do what ``PlainParts`` of ``attention/linear_parts.py`` does behind a rotary embedding, and
round where those round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.kernels.linear_attention.decode import launch_decode
from bitnet_triton.kernels.linear_attention.reference import EPS
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import tiles

_EPS = tl.constexpr(EPS)
# feature maps, the last two by a matrix
ELU = tl.constexpr(0)
RELU = tl.constexpr(1)
PERFORMER = tl.constexpr(2)
HEDGEHOG = tl.constexpr(3)
_MAPS = {"elu": 0, "relu": 1, "performer": 2, "hedgehog": 3}


class PlainStep(NamedTuple):
    """What a plain layer has beside its projections, where it lies.

    Attributes:
        feature_map: "elu", "relu", "performer" or "hedgehog".
        queries: [H D D] of Hedgehog; None for others.
        keys: [Hk D D] of Hedgehog, float32 [F D] of Performer, for the queries too; None for
            others.
        log_decay: float32 [Hk], of each token; None: nothing decays.
    """

    feature_map: str
    queries: Tensor | None = None
    keys: Tensor | None = None
    log_decay: Tensor | None = None

    def features(self, D: int) -> int:
        """Return how many a head of D values gets."""
        if self.feature_map == "performer":
            assert self.keys is not None
            return self.keys.shape[0]
        return 2 * D if self.feature_map == "hedgehog" else D


@triton.jit
def _rotated(
    x_ptr, cos_ptr, sin_ptr, position, P, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Return a head [BLOCK_D] in float32, rotated and rounded as ``rotary`` does it."""
    HALF: tl.constexpr = D // 2
    kind = x_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    is_first = dims < HALF
    # padding on the left stands before position 0
    row = tl.maximum(position, 0).to(tl.int64)
    is_known = is_dim & (row < P)
    cos = tl.load(cos_ptr + row * D + dims, mask=is_known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + row * D + dims, mask=is_known, other=float("nan")).to(tl.float32)
    x = tl.load(x_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    across = tl.load(x_ptr + tl.where(is_first, dims + HALF, dims - HALF), mask=is_dim, other=0.0)
    straight = (x * cos).to(kind).to(tl.float32)
    crossed = (across.to(tl.float32) * tl.where(is_first, -sin, sin)).to(kind).to(tl.float32)
    return tl.where(is_dim, (straight + crossed).to(kind).to(tl.float32), 0.0)


@triton.jit
def _products(
    x, weight_ptr, first, rows, kind: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the products [BLOCK_F] of x with rows of a matrix [rows D], from ``first`` on."""
    f = first + tl.arange(0, BLOCK_F)
    dims = tl.arange(0, BLOCK_D)
    at = weight_ptr + f[:, None] * D + dims[None, :]
    weight = tl.load(at, mask=(f < rows)[:, None] & (dims < D)[None, :], other=0.0)
    return tl.sum(weight.to(kind).to(tl.float32) * x[None, :], axis=1)


@triton.jit
def _plain_features_kernel(
    # tensors: heads [B H + 2 Hk D]; cos, sin [P D]; of_queries, of_keys: see ``PlainStep``;
    # rates [Hk] or None; features [B H + Hk F]; values [B Hk D + 1]; log_decay [B Hk] or None;
    # int32 [B]: positions, is_token, 0 for padding, which leaves the state as it is
    heads_ptr, cos_ptr, sin_ptr, of_queries_ptr, of_keys_ptr, rates_ptr,
    features_ptr, values_ptr, log_decay_ptr, positions_ptr, is_token_ptr,
    # sizes and scalars; root = D^-1/4
    H, Hk, P, root,
    # compile-time
    DEPENDENT: tl.constexpr, MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Map one head: rotate and take features of queries and keys, put a one behind values."""
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    kind: tl.constexpr = heads_ptr.dtype.element_ty
    head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    x_ptr = heads_ptr + (b * (H + 2 * Hk) + head) * D
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < D
    if head >= H + Hk:
        to = values_ptr + (b * Hk + head - H - Hk) * (D + 1)
        tl.store(to + dims, tl.load(x_ptr + dims, mask=is_dim, other=0.0), mask=is_dim)
        tl.store(to + D, 1.0)
    else:
        is_query = head < H
        keeps = 1.0
        if not is_query:
            keeps = tl.load(is_token_ptr + b).to(tl.float32)
            if log_decay_ptr is not None:
                rate = tl.load(rates_ptr + head - H)
                tl.store(log_decay_ptr + b * Hk + head - H, keeps * rate)
        x = _rotated(x_ptr, cos_ptr, sin_ptr, tl.load(positions_ptr + b), P, D, BLOCK_D)
        to = features_ptr + (b * (H + Hk) + head) * F
        if MAP == ELU:
            y = tl.where(x > 0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0).to(kind).to(tl.float32)
            y = (y + 1.0).to(kind).to(tl.float32)
            tl.store(to + dims, (keeps * y).to(kind), mask=is_dim)
        elif MAP == RELU:
            # not a maximum: what is no number stays so
            y = tl.where(x < 0, 0.0, x)
            tl.store(to + dims, (keeps * y).to(kind), mask=is_dim)
        elif MAP == PERFORMER:
            x *= root
            length = tl.sum(x * x, axis=0) / 2
            largest = 0.0
            if is_query:  # its largest feature, which the normaliser divides out
                largest = -float("inf")
                for first in range(0, F, BLOCK_F):
                    y = _products(x, of_keys_ptr, first, F, tl.float32, D, BLOCK_D, BLOCK_F)
                    y = tl.where(first + tl.arange(0, BLOCK_F) < F, y - length, -float("inf"))
                    largest = tl.maximum(largest, tl.max(y, axis=0))
            for first in range(0, F, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                y = _products(x, of_keys_ptr, first, F, tl.float32, D, BLOCK_D, BLOCK_F)
                y = tl.exp(y - length - largest) * (1.0 / tl.sqrt(F * 1.0))
                tl.store(to + f, (keeps * y).to(kind), mask=f < F)
        else:
            weight_ptr = of_queries_ptr + head.to(tl.int64) * D * D
            if not is_query:
                weight_ptr = of_keys_ptr + (head - H).to(tl.int64) * D * D
            largest = 0.0  # of y and -y
            for first in range(0, D, BLOCK_F):
                y = _products(x, weight_ptr, first, D, kind, D, BLOCK_D, BLOCK_F)
                largest = tl.maximum(largest, tl.max(tl.abs(y.to(kind).to(tl.float32)), axis=0))
            total = 0.0
            for first in range(0, D, BLOCK_F):
                y = _products(x, weight_ptr, first, D, kind, D, BLOCK_D, BLOCK_F)
                y = y.to(kind).to(tl.float32)
                y = tl.exp(y - largest) + tl.exp(-y - largest)
                total += tl.sum(tl.where(first + tl.arange(0, BLOCK_F) < D, y, 0.0), axis=0)
            for first in range(0, D, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                y = _products(x, weight_ptr, first, D, kind, D, BLOCK_D, BLOCK_F)
                y = y.to(kind).to(tl.float32)
                more, less = tl.exp(y - largest) / total, tl.exp(-y - largest) / total
                tl.store(to + f, (keeps * more).to(kind), mask=f < D)
                tl.store(to + D + f, (keeps * less).to(kind), mask=f < D)


@triton.jit
def _normalise_kernel(
    # tensors: x float32 [B H D + 1], the sum of the weights last; out [B H D]
    x_ptr, out_ptr,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    weight = tl.load(x_ptr + row * (D + 1) + D)
    x = tl.load(x_ptr + row * (D + 1) + dims, mask=dims < D, other=0.0)
    # features are not negative: where the sum of weights is 0, so is x
    x = x / (weight + _EPS)
    tl.store(out_ptr + row * D + dims, x.to(out_ptr.dtype.element_ty), mask=dims < D)


def launch_plain_step(
    heads: Tensor,
    parts: PlainStep,
    *,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    states: Tensor,
    turn: Tensor,
    is_token: Tensor,
    positions: Tensor,
) -> Tensor:
    """Take one token a row into a state, by launches alone; return [B 1 H D].

    There are two states: done twice, it is as done once.

    Args:
        heads: [B 1 H + 2 Hk D], contiguous: queries, keys and values, not rotated.
        parts: feature map and decay.
        kv_heads: Hk.
        cos: [P D], the rotary embedding of all positions, contiguous.
        sin: likewise.
        states: float32 [2 B Hk F D + 1], contiguous.
        turn: int32 [B], which of the two is read; the other one is written.
        is_token: int32 [B], 0 where a row has padding.
        positions: int32 [B], below P.
    """
    (B, _, many, D), device, Hk = heads.shape, heads.device, kv_heads
    H, F = many - 2 * Hk, parts.features(D)
    features = heads.new_empty(B, 1, H + Hk, F)
    values = heads.new_empty(B, 1, Hk, D + 1)
    log_decay = None
    if parts.log_decay is not None:
        log_decay = torch.empty((B, 1, Hk), dtype=torch.float32, device=device)
    overlap = dependent(device)
    launch(_plain_features_kernel, (many, B))(
        heads, cos, sin, parts.queries, parts.keys, parts.log_decay,
        features, values, log_decay, positions, is_token,
        H, Hk, cos.shape[0], D**-0.25,
        MAP=_MAPS[parts.feature_map], D=D, F=F, **tiles("plain_features", D, device), **overlap,
        # a fused multiply-add would skip the rounding of a product
        enable_fp_fusion=False,
    )  # fmt: skip
    q, k = features.split([H, Hk], dim=2)
    x = torch.empty((B, 1, H, D + 1), dtype=torch.float32, device=device)
    launch_decode(
        q, k, values, log_decay=log_decay, beta=None, scale=1.0, before=states, after=states,
        out=x, turn=turn,
    )  # fmt: skip
    out = heads.new_empty(B, 1, H, D)
    launch(_normalise_kernel, (H, B))(x, out, D=D, **tiles("normalise", D, device), **overlap)
    return out
