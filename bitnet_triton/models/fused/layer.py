"""Decoder layers of transformers with another forward, which ``fuse`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bitnet.modeling_bitnet import BitNetDecoderLayer, eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bitnet_triton.models.fused.fusion import (
    BITNET,
    LLAMA,
    Architecture,
    Fusion,
    Launchers,
)
from bitnet_triton.models.planned_attention import layer_inputs, rotation_of


class FusedDecoderLayer(nn.Module):
    """What a decoder layer of transformers becomes by ``fuse``; first of two base classes."""

    architecture: ClassVar[Architecture]
    fusion: Fusion

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDecoderLayer:
        super()._apply(fn, recurse)
        self.fusion.read(self)  # each part has moved by itself
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [B T D] to [B T D]."""
        fusion = self.fusion
        run = fusion.launchers(self, hidden_states, kwargs)
        if run is None:
            # of the class of transformers
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        B, T, D = hidden_states.shape

        def attend(qkv: Tensor, normed: Tensor | None) -> Tensor:
            if hasattr(fusion.attention, "attention_plan"):
                kwargs["layer_inputs"] = layer_inputs(
                    fusion.attention, None if normed is None else normed.view(B, T, D),
                    position_embeddings, past_key_values,
                )  # fmt: skip
            return self._attend(
                run, qkv.view(B, T, -1, fusion.attention.head_dim), position_embeddings,
                attention_mask, past_key_values, position_ids=position_ids, use_cache=use_cache,
                **kwargs,
            ).reshape(B * T, -1)  # fmt: skip

        return fusion.run(run, hidden_states.reshape(-1, D), attend).view(B, T, D)

    def _attend(
        self,
        run: Launchers,
        heads: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``heads`` [B T H + 2 Hk D], of queries, keys and values, to [B T H D]."""
        fusion = self.fusion
        attention, H, Hk = fusion.attention, fusion.heads, fusion.kv_heads
        # queries and keys turn alike: in one go
        turn = rotation_of(attention, position_embeddings)
        rotated = run.rotate(heads[:, :, : H + Hk], *turn).transpose(1, 2)
        query, key = rotated[:, :H], rotated[:, H:]
        value = heads[:, :, H + Hk :].transpose(1, 2)
        if past_key_values is not None:
            is_traced = torch.compiler.is_compiling() and _grows_in_place(past_key_values)
            update = _update_untraced if is_traced else _update
            key, value = update(past_key_values, attention, key, value)
        implementation = attention.config._attn_implementation
        if run.attention and attention_mask is None and implementation == "sdpa":
            seen = _seen_without_mask(attention, query.shape[2], key.shape[2], kwargs)
            if seen is not None:
                q, k, v = (t.transpose(1, 2) for t in (query, key, value))
                return run.attention(q, k[:, :seen], v[:, :seen], attention.scaling)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attend(
            attention, query, key, value, attention_mask,
            dropout=0.0, scaling=attention.scaling, **kwargs,
        )[0]  # fmt: skip


def _grows_in_place(cache: Any) -> bool:
    """Tell by the first layer of a cache, which is the same for every layer that asks."""
    layers: Any = getattr(cache, "layers", ())
    return len(layers) > 0 and getattr(layers[0], "is_plain", False)


def _update(cache: Any, attention: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Append to the layer of ``cache`` that belongs to ``attention``."""
    return cache.update(key, value, attention.layer_idx)


# A layer that grows in place writes into memory that it finds by its address: no graph holds that.
# Broken off here, what is around does not depend on the number of the layer, and one graph serves
# all of them; traced, each layer would want its own, and dynamo makes eight.
_update_untraced = torch.compiler.disable(_update)


def _seen_without_mask(attention: Any, Tq: int, Tk: int, kwargs: dict[str, Any]) -> int | None:
    """Return how many keys causal attention is over where transformers makes no mask for "sdpa".

    A single query sees all of them. Several stand at the first places, each sees what comes before
    it, and behind them a static cache holds slots that nobody has written. None: not causal.
    """
    if Tq == 1:
        return Tk
    is_causal = kwargs.get("is_causal")
    return Tq if (attention.is_causal if is_causal is None else is_causal) else None


class FusedBitNetLayer(FusedDecoderLayer, BitNetDecoderLayer):
    """A decoder layer of transformers' BitNet after ``fuse``."""

    architecture = BITNET


class FusedLlamaLayer(FusedDecoderLayer, LlamaDecoderLayer):
    """A decoder layer of transformers' Llama after ``fuse``."""

    architecture = LLAMA


def fused_class(layer: nn.Module) -> type[FusedDecoderLayer] | None:
    """Return the class that a layer gets by ``fuse``, or has; None: there is none for it."""
    for kind in (FusedBitNetLayer, FusedLlamaLayer):
        if type(layer) in (kind, kind.architecture.layer):
            return kind
    return None
