"""Start the kernels over chosen blocks: by queries, by groups of tokens, or by a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launch import launch_delta
from bitnet_triton.kernels.flash_attention.operands import score_factors
from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.backward import (
    _selected_blocks_bwd_dkdv_kernel,
    _selected_blocks_bwd_dq_kernel,
    _selected_blocks_bwd_dq_rows_kernel,
    _selected_blocks_bwd_sum_kernel,
)
from bitnet_triton.kernels.selected_blocks.decode import MOST_QUERIES, launch_rows, row_constants
from bitnet_triton.kernels.selected_blocks.forward import _selected_blocks_fwd_kernel
from bitnet_triton.kernels.selected_blocks.lists import (
    Lists,
    Places,
    divide_lists,
    find_places,
    token_bounds,
    turn_lists,
)
from bitnet_triton.kernels.selected_blocks.masked import launch_masked, prefers_mask
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# rows that choose a block, on average, in a group of tokens: they share what is packed
_ROWS_OF_BLOCK = 128
_FEWEST_TOKENS, _MOST_TOKENS = 16, 2048
# what groups that run together keep in memory, in bytes
_MEMORY = 2**27

# among how many parts to divide all lists, on a CPU and on a GPU; and tokens of a part at least
_PARTS, _PARTS_ON_GPU = 64, 512
_SHORTEST_PART = 256


def launch_forward(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    """Map q, k, v to out in the dtype of ``q`` and lse in float32; the scale is positive."""
    if q.ndim == 3:
        packed = replace(call, indices=call.indices[None])
        out, lse = launch_forward(q[None], k[None], v[None], packed)
        return out[0], lse[0]
    if by_rows(q):
        return launch_rows(
            q, k, v, inner_contiguous_lists(call.indices), _row_spans(call, k.shape[1]),
            block=call.block, scale=call.scale, causal=call.causal,
            packed=call.cu_seqlens is not None,
        )  # fmt: skip
    if prefers_mask(k, call):
        lists = replace(call, indices=inner_contiguous_lists(call.indices))
        return launch_masked(q, k, v, lists, _row_spans(call, k.shape[1]))
    return _launch_groups(q, k, v, call)


def by_rows(q: Tensor) -> bool:
    """Tell whether a program takes one query: on a GPU, and wherever there are few."""
    return smallest_dot(q.device) > 1 or q.shape[1] <= MOST_QUERIES


def inner_contiguous_lists(indices: Tensor) -> Tensor:
    """Return lists whose entries lie side by side."""
    return indices if indices.stride(-1) == 1 else indices.contiguous()


def _row_spans(call: SelectedCall, Tk: int) -> tuple[Tensor | None, Tensor | None]:
    """Return where the keys start and end, of each row or each packed query."""
    if call.cu_seqlens is None:
        return call.leftpad, None
    _, starts, ends = token_bounds(call, Tk)
    return starts, ends


@dataclass(frozen=True)
class Groups:
    """Groups of neighbouring tokens of a row and a key head.

    Attributes:
        chunk: tokens of a group.
        of_row: groups of a row.
        programs: all groups of all rows and key heads.
        rows: queries of a group, those of all its heads.
        at_once: groups whose sums lie in memory at a time.
    """

    chunk: int
    of_row: int
    programs: int
    rows: int
    at_once: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, call: SelectedCall, places: Places, values: int) -> Groups:
        """Choose groups, each row of which sums so many ``values``.

        As many tokens as give a block enough rows on average, and no more: what they sum stays in
        the caches.
        """
        B, Tq, H, _ = q.shape
        Hk, S = k.shape[2], call.indices.shape[-1]
        tokens = cdiv(_ROWS_OF_BLOCK * places.blocks, S * (H // Hk))
        chunk = triton.next_power_of_2(max(min(tokens, _MOST_TOKENS, Tq), _FEWEST_TOKENS))
        of_row = cdiv(Tq, chunk)
        programs, rows = B * Hk * of_row, chunk * (H // Hk)
        return cls(
            chunk, of_row, programs, rows, min(programs, max(_MEMORY // (4 * rows * values), 1))
        )

    def launches(self) -> Iterator[tuple[int, int]]:
        """Yield the first group of each launch, and how many it has."""
        for first in range(0, self.programs, self.at_once):
            yield first, min(self.at_once, self.programs - first)


def _launch_groups(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    (B, Tq, H, _), DV = q.shape, v.shape[-1]
    places = find_places(k, call)
    groups = Groups.of(q, k, call, places, DV)
    lists = turn_lists(k.shape[1], call, places, groups.chunk)
    out = torch.empty((B, Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    acc = torch.empty((groups.at_once, groups.rows, DV), device=q.device)
    top, total = torch.empty((2, groups.at_once, groups.rows), device=q.device)
    for first, programs in groups.launches():
        launch(_selected_blocks_fwd_kernel, (programs,))(
            q, k, v, out, lse, acc, top, total,
            *_group_arguments(q, k, v, call, places, lists, groups, first),
            **_constants("selected_blocks_fwd", q, k, v, call),
        )  # fmt: skip
    return out, lse


def _group_arguments(
    q: Tensor, k: Tensor, v: Tensor, call: SelectedCall, places: Places, lists: Lists,
    groups: Groups, first: int,
) -> list[Any]:  # fmt: skip
    """Return what kernels take of which a program has a group, behind their own tensors."""
    (Tq, Tk), Hk = (q.shape[1], k.shape[1]), k.shape[2]
    return [
        lists.tokens, lists.offsets, places.spans,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        first, groups.of_row, places.blocks, Hk, Tq, Tk - Tq, groups.chunk,
        score_factors(call.scale, None)[0],
    ]  # fmt: skip


def _constants(kernel: str, q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> dict[str, int]:
    """Return the constants of a kernel that takes rows by blocks of keys."""
    D, DV = q.shape[-1], v.shape[-1]
    group = q.shape[2] // k.shape[2]
    config = dict(tiles(kernel, head_size(max(D, DV), q.dtype), q.device))
    # a tile of keys is no longer than a block, one of rows has room for all heads of a token
    least = smallest_dot(q.device)
    config["BLOCK_N"] = max(min(config["BLOCK_N"], triton.next_power_of_2(call.block)), least)
    config["BLOCK_M"] = max(config["BLOCK_M"], triton.next_power_of_2(group))
    return {"GROUP": group, "D": D, "DV": DV, "CAUSAL": call.causal, **config}


def _parts_of_all(device: torch.device) -> int:
    """Return how many parts of lists there are at most, beside those that are a whole list."""
    return _PARTS if smallest_dot(device) == 1 else _PARTS_ON_GPU


def launch_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: SelectedCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v in their dtypes."""
    if q.ndim == 3:
        packed = replace(call, indices=call.indices[None])
        dlse = None if dlse is None else dlse[None]
        dq, dk, dv = launch_backward(
            dout[None], dlse, q[None], k[None], v[None], out[None], lse[None], packed
        )
        return dq[0], dk[0], dv[0]
    pivot, delta = launch_delta(dout, dlse, out, lse)
    inputs = (q, k, v, dout, pivot, delta)
    places = find_places(k, call)
    dq = _launch_dq_rows(inputs, call) if by_rows(q) else _launch_dq(inputs, call, places)
    return dq, *_launch_dkdv(inputs, call, places)


def _launch_dq_rows(inputs: tuple[Tensor, ...], call: SelectedCall) -> Tensor:
    q, k, v, *rows = inputs
    (B, Tq), (Tk, Hk), S = q.shape[:2], k.shape[1:3], call.indices.shape[-1]
    indices = inner_contiguous_lists(call.indices)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(_selected_blocks_bwd_dq_rows_kernel, (Tq, Hk, B))(
        q, k, v, indices, *rows, dq,
        *_row_spans(call, Tk),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride()[:3],
        Tq, Tk, S, call.block, score_factors(call.scale, None)[0],
        CAUSAL=call.causal, PACKED=call.cu_seqlens is not None,
        BLOCK_S=triton.next_power_of_2(S),
        **row_constants("selected_blocks_bwd_dq_rows", q, v, Hk, call.block),
    )  # fmt: skip
    return dq


def _launch_dq(inputs: tuple[Tensor, ...], call: SelectedCall, places: Places) -> Tensor:
    q, k, v, *rows = inputs
    groups = Groups.of(q, k, call, places, q.shape[-1])
    lists = turn_lists(k.shape[1], call, places, groups.chunk)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    acc = torch.empty((groups.at_once, groups.rows, q.shape[-1]), device=q.device)
    for first, programs in groups.launches():
        launch(_selected_blocks_bwd_dq_kernel, (programs,))(
            q, k, v, *rows, dq, acc,
            *_group_arguments(q, k, v, call, places, lists, groups, first),
            **_constants("selected_blocks_bwd_dq", q, k, v, call),
        )  # fmt: skip
    return dq


def _launch_dkdv(
    inputs: tuple[Tensor, ...], call: SelectedCall, places: Places
) -> tuple[Tensor, Tensor]:
    q, k, v, *rows = inputs
    Tq, (Tk, Hk), D, DV = q.shape[1], k.shape[1:3], q.shape[-1], v.shape[-1]
    lists = turn_lists(Tk, call, places, Tq)
    of_part = max(call.indices.numel() // _parts_of_all(q.device), _SHORTEST_PART)
    work, slots = divide_lists(lists, of_part)
    n_slots = 2 * (call.indices.numel() // of_part)
    parts = torch.empty((max(n_slots, 1), call.block, D + DV), dtype=torch.float32, device=q.device)
    # keys that are no valid ones stand in no block
    make = torch.empty if call.leftpad is call.cu_seqlens is None else torch.zeros
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    launch(_selected_blocks_bwd_dkdv_kernel, (work.shape[0],))(
        q, k, v, *rows, dk, dv, parts,
        lists.tokens, lists.offsets, places.spans, work, slots,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        slots.shape[0], places.blocks, Hk, Tq, Tk, Tk - Tq, call.block, of_part,
        score_factors(call.scale, None)[0],
        **_constants("selected_blocks_bwd_dkdv", q, k, v, call),
    )  # fmt: skip
    if n_slots:
        launch(_selected_blocks_bwd_sum_kernel, (slots.shape[0],))(
            parts, dk, dv, lists.offsets, places.spans, slots,
            places.blocks, Hk, Tk, call.block, of_part,
            D=D, DV=DV, **tiles("selected_blocks_bwd_sum", max(D, DV), q.device),
        )  # fmt: skip
    return dk, dv
