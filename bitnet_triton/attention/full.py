"""Full causal attention: every query reads every key up to its own position."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext


@dataclass(frozen=True)
class Full:
    """Full causal attention, by PyTorch's own kernels."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=context.mask,
            dropout_p=context.dropout,
            # one token reads all keys; without a mask several tokens are the whole sequence
            is_causal=context.mask is None and q.shape[1] > 1,
            scale=context.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)
