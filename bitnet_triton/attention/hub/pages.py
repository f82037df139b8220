"""Attention inside transformers' continuous batching: the pages of its cache, read where they lie.

The engine hands over the queries, keys and values of all requests of a step, packed, and its cache.
Its other attention functions gather every cached row of every request in each layer; here new rows
are written to their slots and attention goes through block tables. A layer with a sliding window
has a ring of rows instead, which overwrites what the step still needs: there the engine gathers, at
most a window for each request.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bitnet_triton.kernels import Mask, flash_attention, write_pages


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
        ValueError: the layer follows an attention plan, or the engine is older than transformers
            5.23, whose cache has another layout.
    """
    if getattr(module, "attention_plan", None) is not None:
        raise ValueError("`attention`: continuous batching runs models without an attention plan")
    cache, layer = kwargs["cache"], int(getattr(module, "layer_idx", 0))
    allocator = getattr(cache, "layer_to_allocator", {}).get(layer)
    if allocator is None:
        raise ValueError("continuous batching: expected the cache of transformers 5.23 or later")
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    starts = kwargs["cu_seq_lens_q"].int()
    lengths = kwargs["cu_seq_lens_k"][allocator.layer_type].int()
    read = kwargs["read_index"][allocator.index]
    write = kwargs["write_index"][allocator.index]
    settings: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "s_aux": s_aux,
        "cu_seqlens_q": starts,
    }

    window = getattr(allocator, "sliding_window", None)
    if window is None and read.numel():
        k_pages, v_pages = allocator.get_cache_for_block_table(layer)
        rows = write.shape[0]
        write_pages(k_pages, v_pages, k[:rows], v[:rows], write)
        table, used = _step_of(read, lengths, k_pages.shape[1])
        settings |= {"seqused_k": used, "block_table": table}
        if kwargs.get("max_length_q") == 1 and q.shape[0] == table.shape[0]:
            # a token of each request: a batch, which needs one launch less
            settings["cu_seqlens_q"] = None
            one = flash_attention(q[:, None], k_pages, v_pages, **settings)
            return cast("Tensor", one).transpose(0, 1)
        return cast("Tensor", flash_attention(q, k_pages, v_pages, **settings))[None]
    # a step of whole prompts reads nothing from the cache
    rows = write.shape[0]
    k, v = allocator.update(k[:rows], v[:rows], layer, read, write)
    mask = Mask(window=window)
    out = flash_attention(q, k, v, mask=mask, cu_seqlens_k=lengths, **settings)
    return cast("Tensor", out)[None]


def _step_of(read: Tensor, starts: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return the block table [B N] of a step, and the keys int32 [B] of each sequence.

    All layers are handed the same ``read``, a view that the engine makes for each step: what the
    first layer finds stays with it. It waits for the longest length, which a GPU has to tell.
    """
    known: tuple[Tensor, Tensor] | None = getattr(read, "_block_table", None)
    if known is None:
        known = block_table_of(read, starts, page_size), starts.diff()
        cast("Any", read)._block_table = known
    return known


def block_table_of(read: Tensor, starts: Tensor, page_size: int) -> Tensor:
    """Return the pages int32 [B N] of sequences whose rows ``read`` lists, one after the other.

    Args:
        read: [rows], slots of all keys; the first key of a page stands at its first slot.
        starts: int32 [B + 1], where the rows of each sequence begin, and their number.
        page_size: tokens of a page.
    """
    longest = int(starts.diff().max())
    at = starts[:-1, None] + torch.arange(0, max(longest, 1), page_size, device=read.device)
    # behind its last page a sequence names whatever comes next, which nobody reads
    return (read[at.clamp(max=read.shape[0] - 1).long()] // page_size).int()
