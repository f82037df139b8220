"""Attention in plain PyTorch: the oracle of the tests (arXiv:2307.08691, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.pairs import Lengths

# maps scores and visible pairs [B H Tq Tk] to the visible pairs that rows take
Select = Callable[[Tensor, Tensor], Tensor]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    select: Select | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with q [B Tq H D], k [B Tk Hk D], v [B Tk Hk Dv].

    ``s_aux`` [H] is one more score of each row, whose value is zero (gpt-oss, arXiv:2508.10925).
    ``select`` chooses among what ``mask`` shows.

    Returns:
        out [B Tq H Dv] and lse [B H Tq], both in the dtype of ``q``.
    """
    lengths = Lengths(q.shape[1], k.shape[1], leftpad_k, seqused_q, seqused_k)
    k, v = (_repeated(t, q.shape[2], lengths) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = mask.visible_among(lengths, q.device).expand(scores.shape)
    if select is not None:
        visible = select(scores.detach(), visible)

    empty = ~visible.any(-1, keepdim=True)
    # a row without a key has no softmax; zeros instead keep its gradient free of NaN
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
    if s_aux is not None:
        sinks = s_aux[:, None].expand(scores.shape[:-1])
        scores = torch.cat([scores, sinks[..., None]], dim=-1)
        weights = scores.softmax(-1)[..., :-1].masked_fill(~visible, 0.0)
        lse = torch.where(empty.squeeze(-1), sinks, scores.logsumexp(-1))
        return torch.einsum("bhij,bjhd->bihd", weights, v), lse
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def attention_backward_reference(  # noqa: PLR0913 - two more than the forward
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: tuple[Tensor, Tensor],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    select: Select | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv by arXiv:2307.08691, algorithm 2, with all keys in one block.

    What autograd makes of ``attention_reference``, written out, because a registered op runs where
    autograd does not record; ``results`` are out and lse of the forward.
    """
    out, lse = results
    lengths = Lengths(q.shape[1], k.shape[1], leftpad_k, seqused_q, seqused_k)
    Hk = k.shape[2]
    k, v = (_repeated(t, q.shape[2], lengths) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    slope = torch.ones_like(scores[:1, :1, :1, :1])
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped**2
    visible = mask.visible_among(lengths, q.device).expand(scores.shape)
    if select is not None:
        visible = select(scores.detach(), visible)
    # a row without a key has no finite lse, and no visible weight
    finite = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    weights = (scores - finite).masked_fill(~visible, float("-inf")).exp()

    dv = torch.einsum("bhij,bihd->bjhd", weights, dout)
    dweights = torch.einsum("bihd,bjhd->bhij", dout, v)
    delta = torch.einsum("bihd,bihd->bhi", dout, out)[..., None]
    if dlse is not None:
        delta = delta - dlse[..., None]
    dscores = weights * (dweights - delta) * slope * scale
    dq = torch.einsum("bhij,bjhd->bihd", dscores, k)
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q)
    # the query heads of a group share a key head
    groups = q.shape[2] // Hk
    dk, dv = (t.unflatten(2, (Hk, groups)).sum(3) for t in (dk, dv))
    return dq, dk, dv


def _repeated(t: Tensor, H: int, lengths: Lengths) -> Tensor:
    """Repeat key heads for their query heads, [B Tk H D], with zeros where no valid key stands."""
    # memory behind the valid keys may hold anything: 0 * NaN would leak into the sums
    is_key = lengths.valid(t.device)[1][:, :, None, None]
    return torch.where(is_key, t, torch.zeros_like(t)).repeat_interleave(H // t.shape[2], dim=2)
