"""A call of compressed attention: what the launchers of every backend read beside q, k and v."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks, count_blocks

Results = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SparseCall:
    """Everything but q and the compressed keys and values.

    Attributes:
        blocks: sizes and numbers.
        scale: multiplies the scores.
        tokens: of a row, of which the queries are the last.
        attend: whether attention is computed, else only the selection.
        select: whether blocks are chosen.
        keeps_lse: whether lse is stored, which the gradient needs.
        cu_seqlens: int32 [B + 1], where packed sequences start; None: not packed.
        leftpad: int32 [B], the first token that is no padding; None: the first one.
    """

    blocks: SparseBlocks
    scale: float
    tokens: int
    attend: bool = True
    select: bool = False
    keeps_lse: bool = True
    cu_seqlens: Tensor | None = None
    leftpad: Tensor | None = None

    @classmethod
    def build(
        cls, tensors: list[Tensor | None], sizes: list[int], numbers: list[int], scale: float
    ) -> SparseCall:
        """Put together what ``flatten`` took apart."""
        tokens, attend, choose, lse = numbers
        flags = bool(attend), bool(choose), bool(lse)
        return cls(SparseBlocks(*sizes), scale, tokens, *flags, *tensors)

    def flatten(self) -> tuple:
        """Take it apart into the arguments of ``build``."""
        numbers = [self.tokens, int(self.attend), int(self.select), int(self.keeps_lse)]
        return [self.cu_seqlens, self.leftpad], list(astuple(self.blocks)), numbers, self.scale

    def rows(self, q: Tensor) -> Tensor | None:
        """Describe each sequence of q, int32 [B 4]; None: all of them are whole and start at 0.

        The first valid query, how many there are, the place of the first compressed key, and the
        position of the first query.
        """
        if self.cu_seqlens is not None:
            starts, blocks = self.cu_seqlens, self.blocks
            first = block_starts(starts, block=blocks.block, stride=blocks.stride)[:-1]
            columns = (starts[:-1], starts.diff(), first, torch.zeros_like(first))
        elif self.leftpad is not None:
            Tq, none = q.shape[-3], torch.zeros_like(self.leftpad)
            length = self.tokens - self.leftpad.clamp(max=self.tokens)
            padded = (Tq - length).clamp(min=0)
            columns = (padded, Tq - padded, none, (length - Tq).clamp(min=0))
        else:
            return None
        return torch.stack(columns, dim=1).int().contiguous()


def block_starts(cu_seqlens: Tensor, *, block: int, stride: int) -> Tensor:
    """Return where the compressed keys of each packed sequence start, and their number.

    Args:
        cu_seqlens: int32 [B + 1], where sequences start.
        block: tokens of a compression block.
        stride: from one to the next.

    Returns:
        int32 [B + 1].
    """
    counts = (cu_seqlens.diff() - block + stride).clamp(min=0) // stride
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def block_tokens(
    tokens: int, *, block: int, stride: int, cu_seqlens: Tensor | None, leftpad: Tensor | None
) -> Tensor | None:
    """Return the first token of each block, int32 [N], or [B N] with ``leftpad``; -1: none.

    None: block i starts at token i * stride.
    """
    if cu_seqlens is not None:
        # all sequences together have no more blocks than this, and nobody has to look at lengths
        first, place = block_starts(cu_seqlens, block=block, stride=stride), tokens // stride
        i = torch.arange(place, device=cu_seqlens.device, dtype=torch.int32)
        b = torch.searchsorted(first[1:], i, right=True).clamp(max=first.numel() - 2)
        start = cu_seqlens[b] + (i - first[b]) * stride
        return torch.where(i < first[-1], start, -1).int()
    if leftpad is not None:
        i = torch.arange(count_blocks(tokens, block, stride), device=leftpad.device)
        start = leftpad[:, None] + i * stride
        return torch.where(start + block <= tokens, start, -1).int()
    return None


def empty_results(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Results:
    """Return memory for out, lse and indices, of no size where they are not asked for."""
    *lead, T, H, _ = q.shape
    out = q.new_empty([*lead, T, H, v.shape[-1]] if call.attend else [0])
    lse = q.new_empty([*lead, H, T] if call.keeps_lse else [0], dtype=torch.float32)
    chosen = [*lead, T, k.shape[-2], call.blocks.selected] if call.select else [0]
    return out, lse, q.new_empty(chosen, dtype=torch.int32)
