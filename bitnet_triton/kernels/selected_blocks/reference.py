"""Attention over chosen blocks in plain PyTorch: the oracle of the tests (arXiv:2502.11089, 3.3.2).

Each query gathers the keys of its blocks; their number, not that of all keys, is the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selected_keys(
    indices: Tensor,
    *,
    block: int,
    positions: Tensor,
    Tk: int,
    causal: bool,
    leftpad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the places of the keys of chosen blocks, and which of them a query sees.

    Args:
        indices: [B Tq Hk S], numbers of blocks; what is named twice in a list counts once.
        block: keys of a block.
        positions: [Tq], where the queries stand among the keys.
        Tk: how many keys there are.
        causal: keys behind the query are hidden.
        leftpad: [B], the first valid key; blocks count from there.

    Returns:
        int64 and bool, both [B Tq Hk S*block].
    """
    n = indices.long()
    is_repeated = (n[..., :, None] == n[..., None, :]).tril(-1).any(-1)
    lanes = torch.arange(block, device=n.device)
    first = n.new_zeros(len(n)) if leftpad is None else leftpad.long()
    first = first[:, None, None, None]
    p = positions[None, :, None, None]
    j = (first[..., None] + n[..., None] * block + lanes).flatten(-2)
    visible = ((n >= 0) & ~is_repeated).repeat_interleave(block, -1) & (j < Tk)
    # queries that stand before the first valid key are padding
    visible = visible & (p >= first)
    if causal:
        visible = visible & (j <= p)
    return j.clamp(0, Tk - 1), visible


def _gathered(t: Tensor, j: Tensor, visible: Tensor) -> Tensor:
    """Return [B Tq Hk N D] of [B Tk Hk D], zeros where nothing is seen."""
    b, h = (torch.arange(n, device=t.device) for n in (t.shape[0], t.shape[2]))
    rows = t[b[:, None, None, None], j, h[:, None]]
    # memory that is not read may hold anything: 0 * NaN would leak into the sums
    return torch.where(visible[..., None], rows, torch.zeros_like(rows))


def selected_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, j: Tensor, visible: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with q [B Tq H D] to the visible ones of the keys at j, as ``selected_keys`` has them.

    Returns:
        out [B Tq H Dv] and lse [B H Tq], both in the dtype of ``q``.
    """
    q = q.unflatten(2, (k.shape[2], -1))
    keys, values = _gathered(k, j, visible), _gathered(v, j, visible)
    scores = torch.einsum("bihgd,bihnd->bihgn", q, keys) * scale
    hidden = ~visible[:, :, :, None]
    empty = hidden.all(-1, keepdim=True)
    # a row without a key has no softmax; zeros instead keep its gradient free of NaN
    scores = scores.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    out = torch.einsum("bihgn,bihnd->bihgd", weights, values)
    return out.flatten(2, 3), lse.flatten(2, 3).transpose(1, 2)


def selected_attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    results: tuple[Tensor, Tensor], j: Tensor, visible: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv: what autograd makes of the forward, written out.

    A registered op runs where autograd does not record; ``results`` are out and lse of the forward.
    """
    (B, Tk, Hk, D), Dv = k.shape, v.shape[-1]
    q, dout, out = (t.unflatten(2, (Hk, -1)) for t in (q, dout, results[0]))
    lse = results[1].transpose(1, 2).unflatten(2, (Hk, -1))
    keys, values = _gathered(k, j, visible), _gathered(v, j, visible)
    scores = torch.einsum("bihgd,bihnd->bihgn", q, keys) * scale
    # a row without a key has no finite lse, and no visible weight
    pivot = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    weights = (scores - pivot).masked_fill(~visible[:, :, :, None], float("-inf")).exp()
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.transpose(1, 2).unflatten(2, (Hk, -1))[..., None]
    dweights = torch.einsum("bihgd,bihnd->bihgn", dout, values)
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("bihgn,bihnd->bihgd", dscores, keys).flatten(2, 3)
    dkeys = torch.einsum("bihgn,bihgd->bihnd", dscores, q)
    dvalues = torch.einsum("bihgn,bihgd->bihnd", weights, dout)
    b, h = (torch.arange(n, device=k.device) for n in (B, Hk))
    rows = ((b[:, None, None, None] * Tk + j) * Hk + h[:, None]).flatten()
    dk, dv = k.new_zeros(B * Tk * Hk, D), v.new_zeros(B * Tk * Hk, Dv)
    dk.index_add_(0, rows, dkeys.reshape(-1, D))
    dv.index_add_(0, rows, dvalues.reshape(-1, Dv))
    return dq, dk.view(k.shape), dv.view(v.shape)
