"""The lists of blocks turned around: for each block the tokens that chose it, as CSR.

A kernel cleans the lists of the tokens; one stable sort turns them around, so that the order is
that of the tokens, whatever runs in parallel. Nothing here waits for the device: what depends on
values is bounded by shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.order import launch_numbers
from bitnet_triton.runtime import cdiv


@dataclass(frozen=True)
class Places:
    """Where keys, queries and blocks stand.

    Attributes:
        starts: int32 [B], or [Tq] of packed sequences: the first valid key; None: 0.
        ends: one past the last valid key, likewise; None: all.
        bases: int32 [Tq], the number of the first block of each packed sequence, or None.
        spans: int32 [B blocks 2], the first key of each block and one past its last.
        blocks: how many blocks a row has at most; packed sequences are one row.
    """

    starts: Tensor | None
    ends: Tensor | None
    bases: Tensor | None
    spans: Tensor
    blocks: int

    @property
    def packed(self) -> bool:
        """Whether each query has bounds of its own."""
        return self.bases is not None


def token_bounds(call: SelectedCall, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each packed token the number of its sequence, where that starts and ends."""
    starts = call.cu_seqlens
    assert starts is not None
    token = torch.arange(T, dtype=torch.int32, device=starts.device)
    sequence = torch.searchsorted(starts[1:], token, right=True, out_int32=True)
    sequence = sequence.clamp_max(starts.shape[0] - 2).long()
    return sequence, starts[sequence], starts[sequence + 1]


def find_places(k: Tensor, call: SelectedCall) -> Places:
    """Find the places of a call; k [B Tk Hk D], with B = 1 where sequences are packed."""
    B, Tk, block = k.shape[0], k.shape[1], call.block
    if call.cu_seqlens is None:
        blocks = cdiv(Tk, block)
        first = torch.arange(blocks, dtype=torch.int32, device=k.device) * block
        first = first.expand(B, blocks)
        if call.leftpad is not None:
            first = first + call.leftpad[:, None]
        spans = torch.stack([first, (first + block).clamp_max(Tk)], -1)
        return Places(call.leftpad, None, None, spans.contiguous(), blocks)
    starts = call.cu_seqlens
    sequences = starts.shape[0] - 1
    # a block more for each sequence than its whole ones: their numbers are known without waiting
    blocks = Tk // block + sequences
    base = starts[:-1] // block + torch.arange(sequences, dtype=torch.int32, device=k.device)
    number = torch.arange(blocks, dtype=torch.int32, device=k.device)
    owner = torch.searchsorted(base, number, right=True) - 1
    first = starts[owner] + (number - base[owner]) * block
    spans = torch.stack([first, torch.minimum(first + block, starts[owner + 1])], -1)
    sequence, of_start, of_end = token_bounds(call, Tk)
    return Places(of_start, of_end, base[sequence], spans, blocks)


@dataclass(frozen=True)
class Lists:
    """Tokens by group and block.

    Attributes:
        tokens: int32, the tokens of all lists behind one another.
        offsets: int32 [B Hk groups blocks + 1], where each list starts.
    """

    tokens: Tensor
    offsets: Tensor


def turn_lists(Tk: int, call: SelectedCall, places: Places, chunk: int) -> Lists:
    """Return the tokens that chose each block, apart for every ``chunk`` of tokens of a row."""
    indices = call.indices
    (B, Tq, Hk, S), device = indices.shape, indices.device
    numbers = launch_numbers(
        indices, (places.starts, places.ends, places.bases), Tk=Tk, block=call.block, chunk=chunk,
        blocks=places.blocks, causal=call.causal, packed=places.packed,
    )  # fmt: skip
    numbers, order = numbers.flatten().sort(stable=True)
    lists = B * Hk * cdiv(Tq, chunk) * places.blocks
    which = torch.arange(lists + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(numbers, which, out_int32=True)
    return Lists((order // (Hk * S) % Tq).to(torch.int32), offsets)


def divide_lists(lists: Lists, of_part: int) -> tuple[Tensor, Tensor]:
    """Divide lists, each in parts of at most ``of_part`` tokens, and at least one.

    Returns:
        int32 [programs 2], list and part of each program, a list behind the last one for those that
        have nothing to do; and int32 [lists], which slot the first part of a list of several has.
    """
    sizes = lists.offsets.diff()
    parts = (-(-sizes // of_part)).clamp_min(1)
    ends = parts.cumsum(0, dtype=torch.int32)
    programs = sizes.shape[0] + lists.tokens.shape[0] // of_part
    program = torch.arange(programs, dtype=torch.int32, device=sizes.device)
    number = torch.searchsorted(ends, program, right=True, out_int32=True)
    begins = ends - parts
    part = program - begins[number.clamp_max(sizes.shape[0] - 1)]
    several = torch.where(parts > 1, parts, 0)
    slots = several.cumsum(0, dtype=torch.int32) - several
    return torch.stack([number, part], -1), slots
