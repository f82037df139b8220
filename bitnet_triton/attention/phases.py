"""Which mode answers which query of a call: by layer, and by whether it was generated."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.full import Full
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.attention.plan import AttentionPlan


def run_plan(
    plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
) -> Tensor:
    """Attend by the modes that ``plan`` has for a layer.

    A call with queries of both phases, such as one of training, runs as one mask where generated
    tokens read everything; otherwise both modes run, and each query takes its own.

    Args:
        plan: the modes of the model.
        q: [B Tq H D].
        k: [B Tk Hk D].
        v: [B Tk Hk Dv].
        context: says which layer it is, and which queries were generated.
    """
    prefill, decode = (plan.mode(context.layer, phase) for phase in ("prefill", "decode"))
    phase = context.phase(q.shape[1])
    if prefill == decode or phase is not None:
        return (decode if phase == "decode" else prefill)(q, k, v, context)
    if decode == Full() and isinstance(prefill, MaskMode):
        return prefill(q, k, v, replace(context, dense_from=context.first_generated()))
    if context.tokens.cu_seqlens is not None:
        raise ValueError(
            "`prompt_len`: packed sequences take modes that differ by phase only where generated "
            "tokens see everything"
        )
    is_generated = context.is_generated(q)[..., None, None]
    return torch.where(is_generated, decode(q, k, v, context), prefill(q, k, v, context))
