"""Attention inside transformers' continuous batching: the pages of its cache, read where they lie.

The engine hands over the queries, keys and values of all requests of a step, packed, and its cache.
Its other attention functions gather every cached row of every request in each layer; here new rows
are written to their slots and attention goes through block tables, beside a window too: pages in
front of it are given back, and a table begins at the first page that is left.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bitnet_triton.kernels import flash_attention, write_pages


def attend_in_engine(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend with query [1 H R D], key and value [1 Hk R D] of a step -> [1 R H D].

    Args:
        module: the attention layer.
        query: of the tokens of all requests; what stands behind the last one gives zeros.
        key: of the same tokens.
        value: likewise.
        scaling: multiplies the scores. Default: ``D ** -0.5``.
        softcap: largest magnitude of a score.
        s_aux: [H], learnable sinks.
        **kwargs: of the engine.

    Raises:
        ValueError: the plan of the layer is not the one that the engine was started with.
    """
    cache, layer = kwargs["cache"], int(getattr(module, "layer_idx", 0))
    if getattr(module, "attention_plan", None) != cache.plan:
        raise ValueError(
            "`attention`: the model has another plan than continuous batching was started with; "
            "start a new manager"
        )
    allocator = cache.layer_to_allocator[layer]
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    lengths = kwargs["cu_seq_lens_k"][allocator.layer_type].int()
    read = kwargs["read_index"][allocator.index]
    write = kwargs["write_index"][allocator.index]
    settings: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "s_aux": s_aux,
        "cu_seqlens_q": kwargs["cu_seq_lens_q"].int(),
        "mask": cache.masks[layer],
    }
    k_pages, v_pages = allocator.get_cache_for_block_table(layer)
    rows = write.shape[0]
    write_pages(k_pages, v_pages, k[:rows], v[:rows], write)
    if not read.numel():  # a step of whole prompts reads nothing from the cache
        out = flash_attention(q, k[:rows], v[:rows], cu_seqlens_k=lengths, **settings)
        return cast("Tensor", out)[None]
    table, used = _step_of(read, lengths, k_pages.shape[1])
    settings |= {"seqused_k": used, "block_table": table}
    if kwargs.get("max_length_q") == 1 and q.shape[0] == table.shape[0]:
        # a token of each request: a batch, which needs one launch less
        settings["cu_seqlens_q"] = None
        one = flash_attention(q[:, None], k_pages, v_pages, **settings)
        return cast("Tensor", one).transpose(0, 1)
    return cast("Tensor", flash_attention(q, k_pages, v_pages, **settings))[None]


def _step_of(read: Tensor, starts: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return the block table [B N] of a step, and the keys int32 [B] of each sequence.

    All layers of a kind are handed the same ``read``, a view that the engine makes for each step:
    what the first layer finds stays with it. It waits for the longest length, which a GPU has to
    tell.
    """
    known: tuple[Tensor, Tensor] | None = getattr(read, "_block_table", None)
    if known is None:
        used = starts.diff()
        known = block_table_of(read, used, page_size), used
        cast("Any", read)._block_table = known
    return known


def block_table_of(read: Tensor, used: Tensor, page_size: int) -> Tensor:
    """Return the pages int32 [B N] of sequences whose pages ``read`` lists, one after the other.

    Args:
        read: [pages], those of all sequences.
        used: int32 [B], keys of each sequence, which lie in as few pages as they can.
        page_size: tokens of a page.
    """
    pages = (used + page_size - 1) // page_size
    behind = pages.cumsum(0)
    at = (behind - pages)[:, None] + torch.arange(int(pages.max()), device=read.device)
    # behind its last page a sequence names whatever comes next, which nobody reads
    return read[at.clamp(max=read.shape[0] - 1)].int()
