"""Attention layers that follow a plan: they tell modes what entered, and hold their parameters."""

from __future__ import annotations

from typing import Any, cast

import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.attention.context import LayerInputs
from bitnet_triton.cache import Memory


class PlannedAttention(hf.BitNetAttention):
    """transformers' BitNet attention, which hands on what modes want to know."""

    attention_plan: AttentionPlan

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B T D] to [B T D]."""
        kwargs["layer_inputs"] = layer_inputs(
            self, hidden_states, position_embeddings, past_key_values
        )
        return super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )


def layer_inputs(
    attention: Any,
    hidden_states: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    cache: Cache | None,
) -> LayerInputs:
    """Return what a mode is told about the call of its layer."""
    # transformers' dynamic caches have no layer before its first tokens
    layers = [] if cache is None else cache.layers[attention.layer_idx :][:1]
    memory = next((layer for layer in layers if isinstance(layer, Memory)), None)
    return LayerInputs(hidden_states, position_embeddings, memory)


def give_plan(decoder: nn.Module, plan: AttentionPlan) -> None:
    """Let the attention layers of ``decoder`` follow ``plan``, with what its modes bring to them.

    Raises:
        ValueError: two modes of a layer have one name and different parameters.
    """
    hub.set_plan(decoder, plan)
    for index, layer in enumerate(cast("Any", decoder).layers):
        attention = layer.self_attn
        brought: dict[str, nn.Module] = {}
        attention.__class__ = PlannedAttention
        for mode in dict.fromkeys(plan.modes(index)):
            module = mode.module(cast("Any", decoder).config)
            if module is not None:
                _check_same(mode.name, brought.setdefault(mode.name, module), module)
        for name in set(getattr(attention, "brought", ())) - set(brought):
            delattr(attention, name)
        attention.brought = tuple(brought)
        for name, module in brought.items():
            _attach(attention, name, module, layer.input_layernorm.weight)


def _attach(attention: Any, name: str, module: nn.Module, like: Tensor) -> None:
    """Hang the parameters of a mode at an attention layer, unless they are there."""
    there = getattr(attention, name, None)
    if isinstance(there, nn.Module):
        _check_same(name, there, module)
        return
    module.to(device=like.device, dtype=like.dtype)
    init_from = getattr(module, "init_from", None)
    if init_from is not None:
        init_from(attention)
    # the ternary replacement passes over it
    module.stays_dense = not getattr(module, "ternary", False)  # type: ignore[assignment]
    attention.add_module(name, module)


def _check_same(name: str, there: nn.Module, module: nn.Module) -> None:
    sizes = [sorted((n, t.numel()) for n, t in m.state_dict().items()) for m in (there, module)]
    is_packed = len(sizes[0]) != len(sizes[1])  # ternary by now
    if type(there) is not type(module) or (sizes[0] != sizes[1] and not is_packed):
        raise ValueError(
            f"`attention`: two modes {name!r} of one layer bring parameters that differ"
        )
