"""What an index learns: to score blocks as attention weighs them (arXiv:2606.13392)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# entries of the scores of all heads that are held at a time
_ENTRIES = 1 << 25


def index_loss(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, *, scale: float, block: int,
    starts: Tensor, is_query: Tensor, indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean over queries and heads of KL(p || p_index), differentiable in the index.

    p is what the heads of a group weigh the keys with, on average; p_index the softmax of index
    query times index key over ``sqrt(D)``. Both are over the keys that a query sees, or over those
    of the blocks that it has chosen.

    Args:
        index_q: [B T Hk D].
        index_k: [B T 1 D].
        q: [B T H D], of attention; no gradient flows there.
        k: [B T Hk D].
        scale: of the scores of attention.
        block: keys of a block.
        starts: int64 [B T], the column in which the text of each token starts.
        is_query: bool [B T], which queries count.
        indices: int32 [B T Hk S], chosen blocks; None: all keys that a query sees.
    """
    q, k = q.detach(), k.detach()
    (B, T, H, _), Hk = q.shape, k.shape[2]
    rows = max(1, _ENTRIES // (B * H * T))
    total = index_q.new_zeros((), dtype=torch.float32)
    for first in range(0, T, rows):
        part = slice(first, min(first + rows, T))
        chosen = None if indices is None else indices[:, part]
        total = total + checkpoint(
            _divergence, index_q[:, part], index_k[:, : part.stop], q[:, part], k[:, : part.stop],
            scale, block, first, starts[:, part], is_query[:, part], chosen, use_reentrant=False,
        )  # fmt: skip
    return total / (is_query.sum() * Hk).clamp_min(1)


def _divergence(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, scale: float, block: int, first: int,
    starts: Tensor, is_query: Tensor, indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the sum over the queries of a part, the first of which stands in column ``first``."""
    (B, Tq, _, D), (Tk, Hk) = q.shape, k.shape[1:3]
    column = torch.arange(Tk, device=q.device)
    row = torch.arange(first, first + Tq, device=q.device)
    seen = (column <= row[:, None]) & (column >= starts[..., None])  # [B Tq Tk]
    seen = seen[:, :, None].expand(B, Tq, Hk, Tk)
    if indices is not None:
        of_block = torch.div(column - starts[..., None], block, rounding_mode="floor")
        chosen = (indices[..., None, :] == of_block[:, :, None, :, None]).any(-1)
        seen = seen & chosen
    seen = seen & is_query[..., None, None]
    groups = q.unflatten(2, (Hk, -1)).float()
    scores = torch.einsum("bthgd,bshd->bthgs", groups, k.float()) * scale
    p = _softmax(scores, seen[:, :, :, None]).exp().mean(3)  # [B Tq Hk Tk]
    p = p.masked_fill(~seen, 0.0)
    found = torch.einsum("bthd,bsd->bths", index_q.float(), index_k[:, :, 0].float()) * D**-0.5
    log_index = _softmax(found, seen)
    return (torch.xlogy(p, p) - p * log_index.masked_fill(~seen, 0.0)).sum()


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Return the logarithms of a softmax over what is seen; finite where nothing is."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
