"""Attention layers that follow a plan: they tell modes what entered, and hold their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.attention.context import LayerInputs
from bitnet_triton.attention.mode import Mode
from bitnet_triton.cache import Memory

# what ``give_plan`` hangs at an attention layer
_OWN = ("attention_plan", "brought", "is_rotated")


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
        turn = rotation_of(self, position_embeddings)
        return super().forward(hidden_states, turn, attention_mask, past_key_values, **kwargs)


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
    return LayerInputs(hidden_states, position_embeddings, memory, is_cached=cache is not None)


def rotation_of(
    attention: nn.Module, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines by which a layer rotates: those of no angle, if it does not."""
    if getattr(attention, "is_rotated", True):
        return position_embeddings
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)


def give_plan(decoder: nn.Module, plan: AttentionPlan) -> None:
    """Let the attention layers of ``decoder`` follow ``plan``, with what its modes bring to them.

    Raises:
        ValueError: two modes of a layer have one name and different parameters; a mode is called
            like something that attention layers have, or brings buffers that are not saved. Nothing
            was changed then.
    """
    model = cast("Any", decoder)
    every = [
        _brought(layer.self_attn, plan.modes(index), model.config)
        for index, layer in enumerate(model.layers)
    ]
    hub.set_plan(decoder, plan)
    for layer, brought in zip(model.layers, every):
        attention = layer.self_attn
        attention.__class__ = PlannedAttention
        for name in set(getattr(attention, "brought", ())) - set(brought):
            delattr(attention, name)
        former = getattr(attention, "brought", {})
        attention.brought = {name: mode for name, (mode, _) in brought.items()}
        # both phases of such a layer have the same mode: no memory serves two
        attention.is_rotated = all(mode.takes_rotated for mode in plan.modes(attention.layer_idx))
        for name, (mode, module) in brought.items():
            if name in former and _says(former[name], model.config) == _says(mode, model.config):
                continue  # its parameters are there, ternary or adapted by now
            _attach(attention, name, module, layer.input_layernorm.weight)


def _brought(
    attention: nn.Module, modes: Iterable[Mode], config: Any
) -> dict[str, tuple[Mode, nn.Module]]:
    """Return the modes of a layer that bring something, and what, by name."""
    former = getattr(attention, "brought", ())
    brought: dict[str, tuple[Mode, nn.Module]] = {}
    for mode in dict.fromkeys(modes):
        name = mode.name
        if name in _OWN or (hasattr(attention, name) and name not in former):
            raise ValueError(
                f"`attention`: no mode can be called {name!r}, attention layers have one"
            )
        module = mode.module(config)
        unsaved = [] if module is None else sorted(_unsaved(module))
        if unsaved:
            raise ValueError(
                f"`attention`: mode {name!r}: loading would leave the buffer {unsaved[0]!r} empty, "
                "which is not saved; register it with persistent=True"
            )
        if module is None:
            continue
        other, _ = brought.setdefault(name, (mode, module))
        if _says(other, config) != _says(mode, config):
            raise ValueError(
                f"`attention`: two modes {name!r} of one layer bring parameters that differ"
            )
    return brought


def _attach(attention: Any, name: str, module: nn.Module, like: Tensor) -> None:
    """Hang the parameters of a mode at an attention layer."""
    module.to(device=like.device, dtype=like.dtype)
    init_from = getattr(module, "init_from", None)
    if init_from is not None:
        init_from(attention)
    # the ternary replacement passes over it
    module.stays_dense = not getattr(module, "ternary", False)  # type: ignore[assignment]
    attention.add_module(name, module)


def _unsaved(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()} - set(module.state_dict())


def _says(mode: Mode, config: Any) -> tuple[list, list]:
    """Return what tells the parameters of a mode from those of another one, and their use."""
    with torch.device("meta"):
        module = mode.module(config)
    assert module is not None
    kinds = [(name, type(part), part.extra_repr()) for name, part in module.named_modules()]
    return kinds, sorted((name, tuple(t.shape)) for name, t in module.state_dict().items())
