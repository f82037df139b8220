"""Full attention: every query reads every key that transformers shows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import MaskMode, masked_attention
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Full(MaskMode):
    """Full attention, causal unless the model says otherwise, by ``flash_attention``.

    Two calls that no mask describes run on PyTorch's own attention: those with a matrix for a mask,
    which a user passed or transformers made of more than padding, and those with dropout.
    """

    @property
    def mask(self) -> Mask:
        """Causal."""
        return CAUSAL

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        if context.tokens.matrix is None and not context.dropout:
            return masked_attention(q, k, v, context.tokens.mask, context)[0]
        if context.softcap is not None:
            raise ValueError("`softcap`: goes neither with a matrix for a mask nor with dropout")
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=_matrix(q, k, context),
            dropout_p=context.dropout,
            scale=context.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)


def _matrix(q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
    """Return the mask of a call as [B 1 Tq Tk]."""
    tokens = context.tokens
    if tokens.matrix is not None:
        return tokens.matrix
    if tokens.cu_seqlens is not None:
        raise ValueError("`attention_dropout`: packed sequences go without")
    return tokens.mask.visible(q.shape[1], k.shape[1], device=q.device, **tokens.lengths(q, k))
