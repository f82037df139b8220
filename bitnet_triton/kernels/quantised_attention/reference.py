"""Attention over codes in plain PyTorch: they are read, and attended to by the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.quantised_attention.codes import KeyValueCodes


def quantised_attention_reference(
    q: Tensor, codes: KeyValueCodes, used: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with q [B Tq H D] to the first ``used`` [B] tokens of what codes stand for.

    Returns:
        out [B Tq H D] and lse [B H Tq], in the dtype of ``q``.
    """
    B, Tq, H, D = q.shape
    out, lse = q.new_zeros(B, Tq, H, D), q.new_full((B, H, Tq), float("-inf"))
    for b, n in enumerate(used.tolist()):
        if n == 0:
            continue
        k, v = (t.to(q.dtype) for t in codes.read(b, 0, n))  # [Hk n D]
        k, v = (t.repeat_interleave(H // t.shape[0], dim=0) for t in (k, v))
        scores = torch.einsum("thd,hnd->htn", q[b], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lse[b] = scores.logsumexp(-1)
        out[b] = torch.einsum("htn,hnd->thd", scores.softmax(-1), v)
    return out, lse
