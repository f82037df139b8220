"""Full attention: every query reads every key that transformers shows it."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import MaskMode, attend_and_tell
from bitnet_triton.attention.mode import Reads
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.kernels import Mask

logger = logging.getLogger("bitnet_triton")


@dataclass(frozen=True)
class Full(MaskMode):
    """Full attention, causal unless the model says otherwise, by ``flash_attention``.

    Two calls that no mask describes run on PyTorch's own attention: those with a matrix for a mask,
    which a user passed or transformers made of more than padding, and those with dropout; in plain
    PyTorch, if scores are bounded as well. The log says so once (not from inside a compiled graph).
    """

    @property
    def mask(self) -> Mask:
        """Causal."""
        return CAUSAL

    @property
    def pages_mask(self) -> Mask | None:
        """Causal, unless a subclass attends in another way."""
        return self.mask if type(self).__call__ is Full.__call__ else None

    @property
    def sees_everything(self) -> bool:
        """It is that."""
        return True

    @property
    def reads_any_rows(self) -> bool:
        """It looks at no key's place."""
        return True

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads | None:
        """Count what is given and what the memory has beside it, which trying would not find."""
        beside = 0.0 if context.memory is None else context.memory.rows_beside()
        if not beside:
            return None
        padding = context.memory.held_padding()
        empty = 0.0 if padding is None else padding.float().mean().item()
        rows = k.shape[1] - empty + beside
        return Reads(rows, rows)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        if context.tokens.matrix is None and not context.dropout:
            return attend_and_tell(q, k, v, context.tokens.mask, context)
        if context.memory is not None and not context.memory.keeps_places:
            raise ValueError(_objection(context))
        if not torch.compiler.is_compiling():  # logging would break the graph
            _tell("dropout" if context.tokens.matrix is None else "a matrix for a mask")
        q, k, v, matrix = *(t.transpose(1, 2) for t in (q, k, v)), _matrix(q, k, context)
        if context.softcap is not None or context.s_aux is not None:
            return _in_torch(q, k, v, matrix, context).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=matrix,
            dropout_p=context.dropout,
            scale=context.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y.transpose(1, 2)


def _objection(context: AttentionContext) -> str:
    """Say why a matrix or dropout does not go with a memory whose slots are not places."""
    if context.tokens.matrix is None:
        return "`attention_dropout`: a cache of pages, codes or chosen tokens goes without"
    if torch.compiler.is_compiling():
        return (
            "`attention_mask`: while torch.compile traces, nobody can look whether it is padding "
            "to the left, which is all that a cache of pages, codes or chosen tokens takes; leave "
            "it out where there is no padding, or do not compile calls with such a cache"
        )
    return (
        "`attention_mask`: a cache of pages, codes or chosen tokens takes padding to the left of "
        f"a row and nothing else; got {list(context.tokens.matrix.shape)}, or tokens on both sides "
        "of padding"
    )


@functools.cache
def _tell(reason: str) -> None:
    logger.info("attention with %s runs on PyTorch's attention, not on flash_attention", reason)


def _in_torch(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, context: AttentionContext) -> Tensor:
    """Attend with bounded scores or sinks, which PyTorch's function does not have, [B H T D]."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores, softcap = q @ k.transpose(2, 3) * context.scale, context.softcap
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if matrix.dtype == torch.bool:
        scores = scores.masked_fill(~matrix, torch.finfo(scores.dtype).min)
    else:
        scores = scores + matrix
    if context.s_aux is not None:
        sinks = context.s_aux.to(scores.dtype)[:, None, None]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype)
    return F.dropout(weights, context.dropout) @ v


def _matrix(q: Tensor, k: Tensor, context: AttentionContext) -> Tensor:
    """Return the mask of a call as [B 1 Tq Tk]."""
    tokens = context.tokens
    if tokens.matrix is not None:
        return tokens.matrix
    if tokens.cu_seqlens is not None:
        raise ValueError("`attention_dropout`: packed sequences go without")
    return tokens.mask.visible(q.shape[1], k.shape[1], device=q.device, **tokens.lengths(q, k))
