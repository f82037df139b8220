"""Triton choice of many blocks for many tokens, on a CPU.

To keep hundreds of ranks of a row in order costs more than the products that they are ranks of. So
a program scores the units of one key head for a tile of queries as in ``forward``, and writes a
number for each block that orders like its score; then one program for each row of them takes the
highest as in a step of decoding. Some queries go at a time: their numbers stay in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.top_blocks.decode import launch_take, store_keys
from bitnet_triton.kernels.top_blocks.forward import _block_values
from bitnet_triton.kernels.top_blocks.tiles import load_heads, round_to_codes, sequence_range
from bitnet_triton.kernels.top_blocks.units import Units
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles

# rows of queries of a key head, from which on no units need to be divided among programs
_MANY_ROWS = 32
# ranks of a list times blocks of a text, from which on numbers cost less
_LONG = 1 << 15
# bytes of the numbers of queries that go at a time
_MEMORY = 1 << 23


@triton.jit
def _top_blocks_score_rows_kernel(
    # tensors: q [B Tq H D]; units [B U Hu D], of bounds [B U Hu 2 D]; scale [B U Hu] or None; keys
    # int32 [B T Hu SETS N], of T queries
    q_ptr, units_ptr, scale_ptr, keys_ptr,
    # int32 [B] or None: the first valid column, one past the last one
    leftpad_ptr, used_ptr,
    # strides, in elements
    q_stride_b, q_stride_t, q_stride_h, units_stride_b, units_stride_u, units_stride_h,
    scale_stride_b, scale_stride_u, scale_stride_h,
    # sizes; the launch takes T queries, from t0 on
    Tq, Tk, t0, T, N, initial, local,
    # compile-time
    GROUP: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, UNITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    BEFORE: tl.constexpr = WINDOW // STRIDE - 1
    COLUMNS: tl.constexpr = triton.next_power_of_2(UNITS + BEFORE)
    PLAIN: tl.constexpr = COLUMNS == UNITS
    NB: tl.constexpr = 1 if COLUMNS >= BLOCK_N else BLOCK_N // COLUMNS
    key_head = tl.program_id(1)
    Hu = tl.num_programs(1)
    b = tl.program_id(2)
    batch = b.to(tl.int64)
    _, n, first, _ = sequence_range(leftpad_ptr, used_ptr, None, b, Tq, Tk)

    # row m: set m % SETS of those of the key head, of query t0 + m // SETS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m // SETS < T
    t = t0 + m // SETS
    p = t + n - Tq
    own = tl.where(is_row & (p >= 0), p // (UNITS * STRIDE), -1)
    whole = tl.where(p + 1 >= WINDOW, (p + 1 - WINDOW) // STRIDE + 1, 0)
    blocks = tl.max(own, axis=0) + 1
    end_u = tl.max(tl.where(is_row, whole, 0), axis=0)

    at = t.to(tl.int64) * q_stride_t + (key_head * SETS + m % SETS) * GROUP * q_stride_h
    q_ptr += batch * q_stride_b
    q_least = 0
    q = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, 1 if BOUNDS else 0, D, BLOCK_D)
    if BOUNDS:
        q_least = load_heads(q_ptr, at, q_stride_h, is_row, GROUP, -1, D, BLOCK_D)
        q_least = q_least.to(units_ptr.dtype.element_ty)
    q = round_to_codes(q) if scale_ptr is not None else q.to(units_ptr.dtype.element_ty)

    first_u = (first // STRIDE).to(tl.int64)
    units_ptr += batch * units_stride_b + first_u * units_stride_u + key_head * units_stride_h
    if scale_ptr is not None:
        scale_ptr += batch * scale_stride_b + first_u * scale_stride_u + key_head * scale_stride_h
    keys_ptr += batch * T * Hu * SETS * N

    # tiles of units that every row sees whole, before those at the edge
    seen = tl.min(tl.where(is_row, whole, whole + (1 << 30)), axis=0) // UNITS // NB * NB
    middle = tl.maximum(tl.minimum(seen, blocks // NB * NB), 0) if PLAIN else 0
    for is_edge in tl.static_range(2):
        for j0 in range(middle if is_edge else 0, blocks if is_edge else middle, NB):
            value = _block_values(
                q, q_least, q_ptr, at, q_stride_h, is_row, units_ptr, units_stride_u, scale_ptr,
                scale_stride_u, j0, whole, end_u, 0, is_edge, GROUP, D, BOUNDS, UNITS, BEFORE,
                False, BLOCK_N,
            )  # fmt: skip
            store_keys(
                keys_ptr, tl.trans(value), m, j0 + tl.arange(0, NB), blocks, own, initial, local,
                N, Hu, key_head, T, SETS,
            )  # fmt: skip


def launch_top_blocks_long(
    q: Tensor, keys: Tensor, *, units: Units, block: int, selected: int, initial: int, local: int,
    sets: int, tokens: int, scale: Tensor | None, leftpad: Tensor | None, used: Tensor | None,
) -> Tensor:  # fmt: skip
    """Choose many blocks for many queries; arguments are those of ``launch_top_blocks``."""
    (B, Tq, H, D), Hu = q.shape, keys.shape[2]
    N, of_query = cdiv(tokens, block), sets // Hu
    config = tiles("top_blocks_score_rows", head_size(D, q.dtype), q.device)
    of_tile = cdiv(config["BLOCK_M"], of_query)
    at_once = min(max(_MEMORY // (4 * B * sets * N) // of_tile, 1) * of_tile, Tq)
    out = torch.empty((B, Tq, sets, selected), dtype=torch.int32, device=q.device)
    for first in range(0, Tq, at_once):
        T = min(at_once, Tq - first)
        found = torch.empty((B, T, sets, N), dtype=torch.int32, device=q.device)
        launch(_top_blocks_score_rows_kernel, (cdiv(T * of_query, config["BLOCK_M"]), Hu, B))(
            q, keys, scale, found, leftpad, used,
            *q.stride()[:3], *keys.stride()[:3], *((0, 0, 0) if scale is None else scale.stride()),
            Tq, tokens, first, T, N, initial, local,
            GROUP=H // sets, SETS=of_query, D=D, BOUNDS=units.kind == "bounds",
            STRIDE=units.stride, WINDOW=units.window, UNITS=block // units.stride, **config,
        )  # fmt: skip
        launch_take(found, out, leftpad, used, tokens=tokens, block=block, first=first)
    return out


def prefers_numbers(rows: int, selected: int, blocks: int) -> bool:
    """Tell whether numbers of all blocks cost less than ranks of the best, for so many rows."""
    return rows >= _MANY_ROWS and triton.next_power_of_2(selected) * blocks >= _LONG
