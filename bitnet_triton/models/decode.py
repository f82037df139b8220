"""Decode steps of a fused model on a CPU: recorded once, replayed without Python in between.

A step launches some ten kernels a layer. From Python that takes as long as a third of the kernels'
own time; replayed it does not count. What changes from step to step is read from memory: where the
new token stands, how many tokens the cache holds. The cache grows in place, so a recording lasts
until its memory is full.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bitnet_triton.attention import hub
from bitnet_triton.attention.full import Full
from bitnet_triton.cache import GrowingLayer, grow_in_place
from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.rms_norm.op import NORM_FWD
from bitnet_triton.kernels.rotary.op import ROTARY_AND_STORE
from bitnet_triton.models.fused_layer import DENSE_ATTENTION, FusedDecoderLayer, Launchers
from bitnet_triton.runtime import capture, forced_backend, select

# Of these, a position always turns by the same angle
_STATIC_ROPE = frozenset({"default", "linear", "yarn", "llama3"})
_CAUSAL = Mask()


class DecodeSteps:
    """Runs decode steps by a recording; makes one when a second step finds the cache in place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recording: _Recording | None = None
        self._stores: list[tuple[Tensor, Tensor]] = []

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
    ) -> Tensor | None:
        """Return hidden states [B 1 D] of one token a row; None where the model has to do it."""
        B, T = input_ids.shape
        if T != 1 or not input_ids.is_cpu or model.rotary_emb.rope_type not in _STATIC_ROPE:
            return None
        layers = _growing_layers(model, cache, B)
        if layers is None:
            return None
        slot = layers[0].get_seq_length()
        places = _places(attention_mask, position_ids, slot, B)
        # two threads may decode with one model, but a recording has its tensors only once
        if places is None or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._run(model, input_ids, places, layers)
        finally:
            self._lock.release()

    def _run(
        self, model: FusedModel, input_ids: Tensor, places: Tensor, layers: Sequence[GrowingLayer]
    ) -> Tensor | None:
        launchers = _launchers(model)
        if launchers is None:
            return None
        for layer in layers:
            layer.reserve(1)
        stores = [cast("tuple[Tensor, Tensor]", (l.key_store, l.value_store)) for l in layers]
        in_place = _same(stores, self._stores)
        self._stores = stores
        if not in_place:  # beams move it in every step: no recording would last
            return None
        recording = self._recording
        if recording is None or not recording.fits(model, stores, places):
            recording = self._recording = _Recording(model, stores, places, launchers)
        hidden = recording.replay(model, input_ids, places)
        for layer in layers:
            layer.advance(1)
        return hidden


class FusedModel(hf.BitNetModel):
    """transformers' BitNet decoder after ``fuse``."""

    decode_steps: DecodeSteps

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
                    self, input_ids, attention_mask, position_ids, past_key_values
                )
                if hidden is not None:
                    return BaseModelOutputWithPast(
                        last_hidden_state=hidden, past_key_values=past_key_values
                    )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


def _is_plain(model: FusedModel, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call wants hidden states of dense attention, and nothing else."""
    config = model.config
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return False
    for name, value in kwargs.items():
        harmless = value is None or value is (name == "return_dict") or name == "cache_position"
        if not harmless:
            return False
    if config._attn_implementation not in DENSE_ATTENTION | {hub.NAME}:
        return False
    plan = getattr(model.layers[0].self_attn, "attention_plan", None)
    return plan is None or plan.uses_only(Full)


class _Recording:
    """The launches of a step, on the memory of one cache.

    ``places`` [4, B] int32 are, of each row: the slot of the new token in the cache, its position,
    where the padding on the left ends, and how many slots are in use with the new one.
    """

    # what inference mode creates could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: FusedModel,
        stores: list[tuple[Tensor, Tensor]],
        places: Tensor,
        launchers: Launchers,
    ) -> None:
        self._stores = stores
        self._weights = _weights(model)
        self._places = places.clone()
        norm = model.norm.weight
        self._hidden = norm.new_zeros((places.shape[1], norm.shape[0]))
        self._positions = max(2 * int(places[1].max()), model.config.max_position_embeddings)
        every = torch.arange(self._positions, device=norm.device)[None]
        self._angles = tuple(table[0] for table in model.rotary_emb(norm, every))
        with capture() as self._graph:
            self._result = self._record(model, launchers)

    def _record(self, model: FusedModel, launchers: Launchers) -> Tensor:
        x = self._hidden
        for layer, (keys, values) in zip(_decoder_layers(model), self._stores):
            # the layout of ops, [B capacity Hk D]
            attend = self._attend(layer, keys.transpose(1, 2), values.transpose(1, 2))
            x = layer.fusion.run(launchers, x, attend)
        norm = select("rms_norm", NORM_FWD, x.device, model.norm.weight)
        return norm(x, model.norm.weight, model.norm.variance_epsilon)

    def _attend(self, layer: FusedDecoderLayer, keys: Tensor, values: Tensor) -> Any:
        # Triton is imported on first use
        from bitnet_triton.kernels.flash_attention.decode import launch_decode

        slots, positions, leftpad, used = self._places
        rotate = select("rotary_and_store", ROTARY_AND_STORE, keys.device)
        head_dim, scale = layer.fusion.attention.head_dim, layer.fusion.attention.scaling

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.view(qkv.shape[0], 1, -1, head_dim)
            q = rotate(heads, *self._angles, keys, values, slots, positions)
            out, _ = launch_decode(
                q, keys, values, mask=_CAUSAL, scale=scale, leftpad_k=leftpad, seqused_k=used
            )
            return out.view(qkv.shape[0], -1)

        return attend

    def fits(self, model: FusedModel, stores: list[tuple[Tensor, Tensor]], places: Tensor) -> bool:
        """Tell whether the memory that was recorded is still the model's and the cache's."""
        return (
            places.shape == self._places.shape
            and _same(stores, self._stores)
            and int(places[1].max()) < self._positions
            and _weights(model) == self._weights
        )

    def replay(self, model: FusedModel, input_ids: Tensor, places: Tensor) -> Tensor:
        """Run a step; return hidden states [B 1 D]."""
        self._hidden.copy_(model.embed_tokens(input_ids)[:, 0])
        self._places.copy_(places)
        self._graph.replay()
        return self._result.clone()[:, None]


def _growing_layers(model: FusedModel, cache: Cache, B: int) -> Sequence[GrowingLayer] | None:
    """Return the layers of a cache that holds tokens of B rows and grows in place, or None."""
    if len(cache.layers) != len(model.layers):
        return None
    if not all(type(layer) is GrowingLayer for layer in cache.layers):
        return None
    layers = cast("list[GrowingLayer]", cache.layers)
    keys = layers[-1].keys
    if keys is None or keys.shape[0] != B or keys.dtype != model.norm.weight.dtype:
        return None
    return layers if layers[0].get_seq_length() == keys.shape[-2] > 0 else None


def _places(
    attention_mask: Tensor | None, position_ids: Tensor | None, slot: int, B: int
) -> Tensor | None:
    """Return slot, position, padding and slots in use of each row; None where that is not all."""
    places = torch.full((4, B), slot, dtype=torch.int32)
    places[2] = 0
    places[3] += 1
    if attention_mask is not None and not attention_mask.all():
        if attention_mask.shape != (B, slot + 1):
            return None
        leftpad = slot + 1 - attention_mask.count_nonzero(1)
        if not torch.equal(torch.arange(slot + 1) >= leftpad[:, None], attention_mask != 0):
            return None
        places[2] = leftpad
    if position_ids is not None:
        if position_ids.ndim != 2:
            return None
        places[1] = position_ids[:, 0]
    return places


def _launchers(model: FusedModel) -> Launchers | None:
    """Return what every layer runs; None where one of them, or the backend, has objections."""
    like_hidden = model.norm.weight.data  # a plain tensor of their dtype
    found = [layer.fusion.launchers(layer, like_hidden, {}) for layer in _decoder_layers(model)]
    is_fused = None not in found and not (
        model.norm._forward_hooks or model.norm._forward_pre_hooks
    )
    return found[0] if is_fused and forced_backend() in (None, "triton") else None


def _weights(model: FusedModel) -> list[Any]:
    """Return what tells whether weights are where they were: addresses of all that is recorded."""
    seen: list[Any] = [model.norm.weight.dtype, model.norm.weight.data_ptr()]
    for layer in _decoder_layers(model):
        seen += layer.fusion.addresses()
    return seen


def _decoder_layers(model: FusedModel) -> Iterator[FusedDecoderLayer]:
    return cast("Iterator[FusedDecoderLayer]", iter(model.layers))


def _same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    return len(some) == len(others) and all(
        a is c and b is d for (a, b), (c, d) in zip(some, others)
    )
