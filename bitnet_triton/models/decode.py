"""Decode steps of a fused model: recorded once, replayed without Python in between.

A step launches some ten kernels a layer. From Python that takes as long as a third of the kernels'
own time on a CPU, and longer than all of it on a GPU, where a recording is a CUDA graph; replayed
it does not count. Caches keep their memory, so a recording lasts until a full one has to grow.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.bitnet.modeling_bitnet import BitNetModel as HfBitNetModel
from transformers.models.llama.modeling_llama import LlamaModel

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.attention.caches import tell_padding
from bitnet_triton.attention.full import Full
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.cache import GrowingLayer, SinkWindowLayer, grow_in_place
from bitnet_triton.kernels import Mask
from bitnet_triton.models.fusion import DENSE_ATTENTION
from bitnet_triton.models.recording import (
    Recording,
    Step,
    Stores,
    can_replay,
    describe_places,
    launchers_of,
    same_stores,
)

logger = logging.getLogger("bitnet_triton")

# Of these, a position always turns by the same angle
_STATIC_ROPE = frozenset({"default", "linear", "yarn", "llama3"})
_CAUSAL = Mask()


class DecodeSteps:
    """Runs decode steps by a recording; makes one when a second step finds the cache in place.

    Attributes:
        recording: of the last step that was recorded, if any was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.recording: Recording | None = None
        self._stores: Stores = []
        self._told = False

    def __deepcopy__(self, memo: dict) -> DecodeSteps:
        return DecodeSteps()

    def __reduce__(self) -> tuple:
        return DecodeSteps, ()

    def run(
        self,
        model: FusedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        prompt_len: int | Tensor | None,
    ) -> Tensor | None:
        """Return hidden states [B 1 D] of one token a row; None where the model has to do it."""
        B, T = input_ids.shape
        if T != 1 or not _can_record(input_ids.device):
            return None
        masks = self._masks(model, cache, prompt_len)
        layers = None if masks is None else _layers_in_place(model, cache, B)
        if masks is None or layers is None:
            return None
        # two threads may decode with one model, but a recording has its tensors only once
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._run(model, input_ids, attention_mask, position_ids, cache, layers, masks)
        finally:
            self._lock.release()

    def _run(
        self,
        model: FusedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        layers: Sequence[GrowingLayer | SinkWindowLayer],
        masks: tuple[Mask, ...],
    ) -> Tensor | None:
        B, columns = input_ids.shape[0], layers[0].get_seq_length()
        held, on_gpu = [layer.held for layer in layers], input_ids.is_cuda
        found = describe_places(attention_mask, position_ids, B, columns, held, on_gpu)
        if found is None:
            return None
        tell_padding(cache, found[2])
        for layer in layers:
            layer.reserve(1)
        stores = [layer.stores for layer in layers]
        in_place = same_stores(stores, self._stores)
        self._stores = stores
        if not in_place:  # beams move it in every step: no recording would last
            return None
        left = [layer.held for layer in layers]
        if left != held:  # some have dropped what has left their window
            found = describe_places(attention_mask, position_ids, B, columns, left, on_gpu)
            assert found is not None
        hidden = self._replay(model, input_ids, Step(stores, found[0], found[1], masks))
        if hidden is not None:
            for layer in layers:
                layer.advance(1)
        return hidden

    def _replay(self, model: FusedModel, input_ids: Tensor, step: Step) -> Tensor | None:
        """Run a step; None where the layers would do something else than what is recorded.

        To look at all layers takes part of the time that a GPU works on a step: it starts before
        that, on what was true a step ago, and runs again if it is not true any more.
        """
        if not can_replay(input_ids.device):
            return None
        recording, hidden = self.recording, None
        if recording is not None and recording.fits(step):
            hidden = recording.replay(model, input_ids, step.places)
            if recording.is_untouched():
                return hidden
        launchers = launchers_of(model)
        if launchers is None:
            return None
        if recording is None or hidden is None or not recording.has_weights_of(model):
            self.recording = Recording(model, step, launchers)
            hidden = self.recording.replay(model, input_ids, step.places)
        return hidden

    def _masks(
        self, model: FusedModel, cache: Cache, prompt_len: int | Tensor | None
    ) -> tuple[Mask, ...] | None:
        """Return what the new token may see in each layer; None where no recording says it."""
        plan = _plan(model)
        if plan is None:
            masks: Any = (_CAUSAL,) * len(model.layers)
        else:
            # the longest prompt of the batch: its row is the last to be generated
            first = None if prompt_len is None else int(torch.as_tensor(prompt_len).max())
            if first is not None and cache.get_seq_length() < first:
                return None
            phase = "prefill" if first is None else "decode"
            masks = _masks_of_plan(plan, phase, len(model.layers))
        rope = model.rotary_emb.rope_type
        if rope not in _STATIC_ROPE:
            masks = f"rotary embedding {rope!r} turns a position by more than one angle"
        if not isinstance(masks, str):
            return masks
        if not self._told:
            self._told = True
            logger.info("%s launches each kernel of a decode step: %s", model._kind, masks)
        return None


@functools.lru_cache(maxsize=32)
def _masks_of_plan(plan: AttentionPlan, phase: str, layers: int) -> tuple[Mask, ...] | str:
    """Return the masks of the layers; or which layer does what no mask of a decode step says."""
    # Triton is imported on first use
    from bitnet_triton.kernels.flash_attention.decode import decode_objection

    one = torch.empty(1, 1, 1, 1, device="meta")
    masks = []
    for i in range(layers):
        mode = plan.mode(i, phase)
        # a mode that does more than to show its mask runs by its own code
        objection: str | None = "it is more than a mask"
        if type(mode).__call__ in (MaskMode.__call__, Full.__call__):
            objection = decode_objection(one, one, mode.mask)
        if objection is not None:
            return f"attention {type(mode).__name__.lower()!r} of layer {i}: {objection}"
        masks.append(mode.mask)
    return tuple(masks)


class FusedModel(nn.Module):
    """What a decoder of transformers becomes by ``fuse``; first of two base classes."""

    decode_steps: DecodeSteps
    _kind: str
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
        # of the class of the model
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class FusedBitNetModel(FusedModel, HfBitNetModel):
    """transformers' BitNet decoder after ``fuse``."""

    _kind = "BitNetModel"


class FusedLlamaModel(FusedModel, LlamaModel):
    """transformers' Llama decoder after ``fuse``."""

    _kind = "LlamaModel"


# decoder -> what it becomes; that of this package adds its own
FUSED_MODELS: dict[type[nn.Module], type[FusedModel]] = {
    HfBitNetModel: FusedBitNetModel,
    LlamaModel: FusedLlamaModel,
}


def _can_record(device: torch.device) -> bool:
    if torch.is_grad_enabled():
        return False
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()  # somebody else records
    return device.type == "cpu"


def _plan(model: FusedModel) -> AttentionPlan | None:
    return getattr(model.layers[0].self_attn, "attention_plan", None)


def _is_plain(model: FusedModel, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call wants hidden states of attention by masks, and nothing else."""
    config = model.config
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return False
    for name, value in kwargs.items():
        if name in ("cache_position", "prompt_len"):
            continue
        if not (value is None or value is (name == "return_dict")):
            return False
    return config._attn_implementation in DENSE_ATTENTION | {hub.NAME}


def _layers_in_place(
    model: FusedModel, cache: Cache, B: int
) -> Sequence[GrowingLayer | SinkWindowLayer] | None:
    """Return the layers of a cache that keeps its memory and holds tokens of B rows, or None."""
    if len(cache.layers) != len(model.layers):
        return None
    layers: list[Any] = cache.layers
    dtype, columns = model.norm.weight.dtype, layers[0].get_seq_length()
    for layer in layers:
        if type(layer) not in (GrowingLayer, SinkWindowLayer) or not layer.held:
            return None
        keys = layer.keys
        if keys.shape[0] != B or keys.dtype != dtype or layer.get_seq_length() != columns:
            return None
        if keys.device != model.norm.weight.device:
            return None
    return layers
