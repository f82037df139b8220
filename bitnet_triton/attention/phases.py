"""Which mode answers which query of a call: by layer, and by whether it was generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import Mode, Reads
from bitnet_triton.attention.plan import AttentionPlan


def run_plan(
    plan: AttentionPlan,
    layer: nn.Module | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
) -> Tensor:
    """Attend by the modes that ``plan`` has for a layer.

    A call with queries of both phases, such as one of training, runs as one mask where generated
    tokens read everything; otherwise both modes run, and each query takes its own.

    Args:
        plan: the modes of the model.
        layer: the attention layer, at which the parameters of its modes hang.
        q: [B Tq H D].
        k: [B Tk Hk D].
        v: [B Tk Hk Dv].
        context: says which layer it is, and which queries were generated.
    """
    prefill, decode = plan.modes(context.layer)
    phase = context.phase(q.shape[1])

    def given(mode: Mode, **more: Any) -> AttentionContext:
        return replace(context, module=_module(layer, mode), **more)

    def run(mode: Mode, **more: Any) -> Tensor:
        return mode(q, k, v, given(mode, **more))

    if prefill == decode:
        return run(prefill)
    if phase is not None:
        mode, other = (decode, prefill) if phase == "decode" else (prefill, decode)
        other.remember(k, given(other))
        return run(mode)
    if decode.sees_everything and prefill.takes_dense_rows:
        return run(prefill, dense_from=context.first_generated())
    is_generated = context.is_generated(q)[..., None, None]
    return torch.where(is_generated, run(decode), run(prefill))


def count_reads(
    plan: AttentionPlan,
    layer: nn.Module | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
) -> Reads | None:
    """Return what the mode of the last query says that it reads; None: it has to be tried out.

    Args:
        plan: the modes of the model.
        layer: the attention layer, at which the parameters of its modes hang.
        q: [B Tq H D].
        k: [B Tk Hk D].
        v: [B Tk Hk Dv].
        context: says which layer it is, and which queries were generated.
    """
    phase = context.phase(q.shape[1])
    if phase is None:  # a static cache counts its tokens on the device
        phase = "decode" if bool(context.is_generated(q)[:, -1].all()) else "prefill"
    prefill, decode = plan.modes(context.layer)
    mode = decode if phase == "decode" else prefill
    return mode.reads(q, k, v, replace(context, module=_module(layer, mode)))


def _module(layer: nn.Module | None, mode: Mode) -> nn.Module | None:
    """Return the parameters of a mode, which hang at the layer under its name."""
    return getattr(layer, mode.name, None)
