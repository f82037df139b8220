"""torch's FlexAttention over chosen blocks: what ``selected_block_attention`` does, in its terms.

A BlockMask lists key blocks for a tile of queries, and not for a query: the tile reads the union of
what its tokens have chosen, and a table of all tokens and blocks hides the rest. Tokens that
choose alike cost little, tokens that choose at random soon cost what dense attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import PeerMissingError

TILE = 128  # queries of a tile


def check(q: Tensor, *, backward: bool, most: int) -> None:
    """Raise what FlexAttention cannot do for queries [1 Tq H D].

    Raises:
        PeerMissingError: it has no backward there, its C++ for one query with lists does not
            compile dependably, or so many queries take it minutes.
    """
    if backward and q.device.type == "cpu":
        raise PeerMissingError("FlexAttention has no backward on a CPU")
    if q.shape[1] == 1 and q.device.type == "cpu":
        raise PeerMissingError(
            "the C++ of FlexAttention for one query with lists does not compile dependably on a "
            "CPU: with 1200 keys not, with 300 it does (PyTorch 2.13)"
        )
    if q.shape[1] > most:
        raise PeerMissingError(f"not asked for more than {most} tokens")


def chosen_table(indices: Tensor, blocks: int) -> Tensor:
    """Map lists [1 Tq Hk S] to bool [Hk Tq blocks]: who has chosen what; -1 is none."""
    lists = indices[0].transpose(0, 1).long()
    # a column behind the last block takes what is none
    table = torch.zeros(*lists.shape[:2], blocks + 1, dtype=torch.bool, device=lists.device)
    table.scatter_(-1, torch.where(lists < 0, blocks, lists), True)
    return table[..., :blocks].contiguous()


def make_block_mask(indices: Tensor, T: int, H: int, *, block: int, tile: int = TILE) -> Any:
    """Return the BlockMask of chosen blocks, causal token by token.

    Args:
        indices: int32 [1 Tq Hk S], those of the last Tq of T tokens.
        T: keys.
        H: query heads. Each has a list, as FlexAttention knows none that a group shares.
        block: keys of a block.
        tile: queries that are read for together.
    """
    from torch.nn.attention.flex_attention import BlockMask

    _, Tq, Hk, _ = indices.shape
    group, tiles = H // Hk, -(-Tq // tile)
    table = chosen_table(indices, -(-T // block))
    rows = F.pad(table, (0, 0, 0, tiles * tile - Tq))
    union = rows.view(Hk, tiles, tile, -1).any(2)
    # a stable sort lists the chosen ones first, in their order
    order = union.logical_not().to(torch.int8).sort(dim=-1, stable=True).indices.to(torch.int32)
    counts, order = (
        t.repeat_interleave(group, 0)[None].contiguous()
        for t in (union.sum(-1, dtype=torch.int32), order)
    )

    def visible(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[h // group, i, j // block] & (i + (T - Tq) >= j)

    return BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=(tile, block), mask_mod=visible, seq_lengths=(Tq, T)
    )


def share_read(mask: Any) -> float:
    """Return the share of all pairs of a tile and a key block that are read."""
    return float(mask.kv_num_blocks.float().mean()) / mask.kv_indices.shape[-1]


def make_attend(mask: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compile attention under a BlockMask: q [1 Tq H D] and k, v [1 T Hk D] to [1 Tq H D]."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend
