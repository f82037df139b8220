"""The modes as an attention function of transformers, with the mask function that goes with it.

``attn_implementation="bitnet_triton"`` runs any model of transformers. One with an
``AttentionPlan`` follows it; any other one sees what transformers' masks show.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.hub.mask import describe_mask
from bitnet_triton.attention.hub.pages import attend_in_engine
from bitnet_triton.attention.mode import Reads
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.phases import count_reads, run_plan
from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.tokens import Tokens
from bitnet_triton.runtime.device import autocast_dtype

logger = logging.getLogger("bitnet_triton")

NAME = "bitnet_triton"
_FULL = Full()
# where the function comes from that torch puts in the place of its own for context parallelism
_SHARDED = "torch.distributed.tensor.experimental"
_OF_PLANS = ("prompt_len", "global_tokens", "frequencies", "rotary_scale")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tokens | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [B H Tq D], key and value [B Hk Tk D] -> [B Tq H D].

    The plan is the ``attention_plan`` of ``module``, its attention layer; a module without one
    reads what ``attention_mask`` shows. Further arguments that count are those of a model with a
    plan: ``prompt_len``, ``global_tokens``, ``frequencies``, ``rotary_scale`` and
    ``layer_inputs``, as in ``AttentionContext``.

    Raises:
        ValueError: a model with a plan has learnable sinks (``s_aux``), or asks for what the mode
            of the layer cannot do; or the texts are sharded by ``context_parallel``.
    """
    if not torch.compiler.is_compiling():  # Dynamo does not look at whose a function is
        _refuse_shards()
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        _tell_no_weights()  # as "sdpa" of transformers does
    if kwargs.get("cache") is not None:
        out = attend_in_engine(
            module, query, key, value, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
        return out, None
    plan = getattr(module, "attention_plan", None)
    if plan is not None and s_aux is not None:
        raise ValueError("`s_aux`: a model with an attention plan has no learnable sinks")
    q, k, v, context = _arguments(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
        softcap=softcap, position_ids=position_ids, s_aux=s_aux, **kwargs,
    )  # fmt: skip
    if plan is None:
        return _FULL(q, k, v, context), None
    return run_plan(plan, module, q, k, v, context), None


def _refuse_shards() -> None:
    """Refuse to attend within the shard of a process as if it were the text."""
    if getattr(F.scaled_dot_product_attention, "__module__", "").startswith(_SHARDED):
        raise ValueError(
            f"attention {NAME!r} sees the shard of one process alone under context parallelism, "
            "which replaces PyTorch's attention and no other; train with "
            'attn_implementation="sdpa" and no attention plan there, or without context_parallel '
            "(`cp_size` of accelerate)"
        )


def count(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Reads | None:
    """Return what a call of ``attend`` reads for its last query, as its mode counts it.

    Returns:
        None: it has to be tried out.
    """
    plan = getattr(module, "attention_plan", None)
    if plan is None:
        return None
    return count_reads(plan, module, *_arguments(module, query, key, value, mask, **kwargs))


def _arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tokens | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, AttentionContext]:
    """Return q [B Tq H D], k and v [B Tk Hk D] and the context, as modes take them."""
    tokens = _tokens(module, mask, query, key, kwargs.get("is_causal"))
    if getattr(module, "attention_plan", None) is None:
        tokens = tokens.packed_by(position_ids, query, key)
    context = AttentionContext(
        layer=getattr(module, "layer_idx", 0),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        tokens=tokens,
        dropout=dropout,
        softcap=softcap,
        positions=position_ids,
        s_aux=s_aux,
        inputs=kwargs.get("layer_inputs"),
        **{name: kwargs.get(name) for name in _OF_PLANS},
    )
    # under autocast rotary embeddings leave queries and keys wider than values
    dtype = autocast_dtype(query.device.type) or query.dtype
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (query, key, value))
    return q, k, v, context


def _tokens(
    module: nn.Module,
    attention_mask: Tokens | Tensor | None,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
) -> Tokens:
    if isinstance(attention_mask, Tokens):
        return attention_mask
    if attention_mask is not None:
        return Tokens(matrix=attention_mask)
    # a model that makes no mask says by a flag what it wants, and holds all keys
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    offset = max(key.shape[2] - query.shape[2], 0)
    return Tokens(offset=offset, causal=causal)


@functools.cache
def _tell_no_weights() -> None:
    logger.warning(
        "`output_attentions`: attention %r keeps no weights, nothing is returned for them; "
        'attn_implementation="eager" does',
        NAME,
    )


def set_plan(model: nn.Module, plan: AttentionPlan) -> None:
    """Give every attention layer of ``model`` the plan that ``attend`` follows."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.attention_plan = plan  # type: ignore[assignment]


AttentionInterface.register(NAME, attend)
# without a mask function transformers passes no mask at all, and padding is read like text
AttentionMaskInterface.register(NAME, describe_mask)
