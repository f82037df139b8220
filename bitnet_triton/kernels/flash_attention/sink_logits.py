"""Learnable attention sinks without keys: a logit of each head in the softmax's denominator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_sink_logits(out: Tensor, lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """Let a logit of each head take its part of the weights, and give nothing for it.

    With b that logit: ``lse' = log(exp(lse) + exp(b))`` and ``out' = out exp(lse - lse')``, where
    ``exp(lse - lse') = sigmoid(lse - b)``. Rows that see no key stay zeros; their lse' is b.
    Autograd differentiates this, in ``out`` and ``lse`` too: attention needs no other backward.

    Args:
        out: [B Tq H Dv] or [sum Tq, H, Dv].
        lse: float32 [B H Tq] or [H, sum Tq], -inf where a row sees nothing.
        s_aux: [H]; -inf for a head without a sink.

    Returns:
        ``out'`` in the dtype of ``out``, ``lse'`` in float32.
    """
    logit = s_aux.to(lse.dtype)[:, None]
    is_empty = lse == float("-inf")
    # -inf - -inf would be NaN, and so would gradients that a mask hides afterwards
    finite = lse.masked_fill(is_empty, 0.0)
    # the gradient of a sigmoid near 1 loses what a small sink takes; that of its logarithm does not
    log_share = F.logsigmoid(finite - logit)
    share = log_share.exp().masked_fill(is_empty, 0.0)
    total = logit.where(is_empty, finite - log_share)
    # PyTorch widens as it multiplies: autograd keeps ``out`` and no copy of it in float32
    return (out * share.transpose(-1, -2)[..., None]).to(out.dtype), total
