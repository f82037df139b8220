"""Projections of their own for global tokens (arXiv:2004.05150, section 3.1)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar, cast

import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.attention.longformer import Longformer
from bitnet_triton.attention.tokens import Tokens

Model = TypeVar("Model", bound=nn.Module)


class GlobalAttention(hf.BitNetAttention):
    """transformers' BitNet attention with a second set of projections, for global queries."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B T D] to [B T D]."""
        if isinstance(attention_mask, Tokens) and attention_mask.starts_a_text:
            kwargs["global_heads"] = self._heads(hidden_states, position_embeddings)
        return super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )

    def _heads(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B T H D], k and v [B T Hk D] for global queries."""
        names = ("q_global_proj", "k_global_proj", "v_global_proj")
        flat = (self.get_submodule(name)(x) for name in names)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in flat)
        q, k = hf.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary)
        return q.transpose(1, 2), k.transpose(1, 2), v


def build_projections(decoder: nn.Module, plan: AttentionPlan) -> None:
    """Give the layers of ``decoder`` that ``plan`` wants them for copies of their projections."""
    for index, layer in enumerate(cast("Any", decoder).layers):
        attention = layer.self_attn
        if isinstance(attention, GlobalAttention) or not any(
            isinstance(mode, Longformer) and mode.global_projections for mode in plan.modes(index)
        ):
            continue
        attention.__class__ = GlobalAttention
        for name in ("q", "k", "v"):
            twin = copy.deepcopy(getattr(attention, f"{name}_proj"))
            attention.add_module(f"{name}_global_proj", twin)


def add_global_projections(model: Model) -> Model:
    """Give global tokens projections of their own, copies of the others at first, in place.

    A model that was trained without them computes the same as before; then they can be trained.
    They are saved with the model, and ``config.attention`` says that they are there.

    Args:
        model: ``BitNetForCausalLM`` or ``BitNetModel`` with attention "longformer" in some layer.

    Returns:
        The same model; a second call changes nothing.

    Raises:
        ValueError: no layer has global tokens.
    """
    plan: AttentionPlan | None = getattr(model, "attention_plan", None)
    if plan is None or not plan.uses(Longformer):
        raise ValueError("`model`: expected attention 'longformer' in `config.attention`")
    plan = AttentionPlan(*(tuple(map(_with_projections, p)) for p in (plan.prefill, plan.decode)))
    if not any(getattr(mode, "global_projections", False) for mode in plan.prefill + plan.decode):
        raise ValueError("`model`: expected a layer with 'global_tokens' or 'global_mask'")
    decoder = cast("Any", model).base_model
    build_projections(decoder, plan)
    hub.set_plan(model, plan)
    for part in (cast("Any", model), decoder):
        part.attention_plan = plan
        part.config.attention = plan.to_config()
    return model


def _with_projections(mode: Any) -> Any:
    if isinstance(mode, Longformer) and (mode.global_tokens or mode.global_mask):
        return replace(mode, global_projections=True)
    return mode
