"""Decoders of transformers after ``fuse``: they replay decode steps where that can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.bitnet.modeling_bitnet import BitNetModel as HfBitNetModel
from transformers.models.llama.modeling_llama import LlamaModel

from bitnet_triton.attention import hub
from bitnet_triton.cache import grow_in_place
from bitnet_triton.models.fused.fusion import DENSE_ATTENTION
from bitnet_triton.models.fused.step import DecodeSteps
from bitnet_triton.models.overflow import tell_overflow
from bitnet_triton.models.packing import follow_packing


class FusedModel(nn.Module):
    """What a decoder of transformers becomes by ``fuse``; first of two base classes."""

    decode_steps: DecodeSteps
    kind: str
    config: Any
    layers: nn.ModuleList
    norm: Any
    rotary_emb: Any
    embed_tokens: nn.Embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Map tokens [B T] to hidden states, as transformers' model does."""
        if past_key_values is not None and not torch.compiler.is_compiling():
            grow_in_place(past_key_values)
            if input_ids is not None and inputs_embeds is None and _is_plain(self, kwargs):
                hidden = self.decode_steps.run(
                    self, input_ids, attention_mask, position_ids, past_key_values,
                    kwargs.get("prompt_len"),
                )  # fmt: skip
                if hidden is not None:
                    return BaseModelOutputWithPast(
                        last_hidden_state=hidden, past_key_values=past_key_values
                    )
        attention_mask, use_cache = follow_packing(
            attention_mask, position_ids, past_key_values, use_cache
        )
        # of the class of the model
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        tell_overflow(outputs[0], inputs_embeds if input_ids is None else input_ids)
        return outputs


class FusedBitNetModel(FusedModel, HfBitNetModel):
    """transformers' BitNet decoder after ``fuse``."""

    kind = "BitNetModel"


class FusedLlamaModel(FusedModel, LlamaModel):
    """transformers' Llama decoder after ``fuse``."""

    kind = "LlamaModel"


# decoder -> what it becomes; that of this package adds its own
FUSED_MODELS: dict[type[nn.Module], type[FusedModel]] = {
    HfBitNetModel: FusedBitNetModel,
    LlamaModel: FusedLlamaModel,
}


def _is_plain(model: FusedModel, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call wants hidden states of attention by masks, and nothing else."""
    config = model.config
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return False
    for name, value in kwargs.items():
        if name in ("cache_position", "prompt_len", "context_length"):
            continue
        if not (value is None or value is (name == "return_dict")):
            return False
    return config._attn_implementation in DENSE_ATTENTION | {hub.NAME}
