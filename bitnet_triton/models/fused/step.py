"""Decode steps of a fused model: recorded once, replayed without Python in between.

A step launches some ten kernels a layer. From Python that takes as long as a third of the kernels'
own time on a CPU, and longer than all of it on a GPU, where a recording is a CUDA graph; replayed
it does not count. Memories keep their places, so a recording lasts until a full one has to grow.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan, Mode
from bitnet_triton.attention.mode import Step, StepLayer
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.cache import Call, Memory, begin_call
from bitnet_triton.models.cache_checks import served_objection
from bitnet_triton.models.fused.recording import (
    RecordedStep,
    Recording,
    can_replay,
    launchers_of,
    layer_indices,
    same_tensors,
)
from bitnet_triton.models.rotary import Frequencies, frequencies_of

logger = logging.getLogger("bitnet_triton")

# Of these, a position always turns by the same angle
_STATIC_ROPE = frozenset({"default", "linear", "yarn", "llama3"})
_FULL = Full()


class DecodeSteps:
    """Runs decode steps by a recording; makes one when a second step finds the cache in place.

    Attributes:
        recording: of the last step that was recorded, if any was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.recording: Recording | None = None
        self._addresses: list[tuple[Tensor, ...]] = []
        self._starts = True  # whether the next step is the first one of a text
        self._told = False

    def __deepcopy__(self, memo: dict) -> DecodeSteps:
        return DecodeSteps()

    def __reduce__(self) -> tuple:
        return DecodeSteps, ()

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        prompt_len: int | Tensor | None,
    ) -> Tensor | None:
        """Return hidden states [B 1 D] of one token a row; None where the model has to do it."""
        B, T = input_ids.shape
        if T != 1:
            self._starts = True
            return None
        if not _can_record(input_ids.device) or not can_replay(input_ids.device):
            return None
        # two threads may decode with one model, but a recording has its tensors only once
        if not self._lock.acquire(blocking=False):
            return None
        try:
            recording = self._unchanged()
            indices = layer_indices(model) if recording is None else recording.indices
            memories = _memories(model, indices, cache, B)
            if memories is None:
                return None
            plan: AttentionPlan | None = getattr(model.layers[0].self_attn, "attention_plan", None)
            modes = self._modes(model, plan, indices, memories, prompt_len)
            if modes is None or not self._turns_alike(model, cache):
                return None
            chosen = frequencies_of(cache)
            call = _describe(
                model, plan, attention_mask, position_ids, B, memories, prompt_len,
                model.rotary_emb.inv_freq if chosen is None else chosen.inv_freq,
            )  # fmt: skip
            if call is None:
                return None
            return self._run(model, input_ids, call, plan, memories, modes, chosen)
        finally:
            self._lock.release()

    def _unchanged(self) -> Recording | None:
        """Return the recording, if the model is what was recorded."""
        starts, self._starts = self._starts, False
        if self.recording is not None and self.recording.changes.found(thorough=starts):
            self.recording = None
        return self.recording

    def _run(
        self,
        model: Any,
        input_ids: Tensor,
        call: Call,
        plan: AttentionPlan | None,
        memories: list[Memory],
        modes: tuple[Mode, ...],
        frequencies: Frequencies | None,
    ) -> Tensor | None:
        recording = self.recording
        steps: list[Step] = []
        if recording is None or recording.modes != modes:
            found = self._steps(model, plan, memories, modes)
            if found is None:
                return None
            steps = found
        for memory in memories:
            memory.reserve(1)
        addresses = [memory.address() for memory in memories]
        in_place = same_tensors(addresses, self._addresses)
        self._addresses = addresses
        if not in_place:  # beams move it in every step: no recording would last
            return None
        step = RecordedStep.build(call, memories, modes, addresses, input_ids.is_cuda, frequencies)
        if recording is None or not recording.fits(step):
            launchers = launchers_of(model)
            found = steps or self._steps(model, plan, memories, modes)
            if launchers is None or found is None:
                return None
            recording = self.recording = Recording(model, step, found, launchers)
        hidden = recording.replay(model, input_ids, step)
        for memory in memories:
            memory.advance(1)
        return hidden

    def _modes(
        self,
        model: Any,
        plan: AttentionPlan | None,
        indices: Sequence[int],
        memories: list[Memory],
        prompt_len: int | Tensor | None,
    ) -> tuple[Mode, ...] | None:
        """Return which mode reads the new token in each layer; None where none is recorded."""
        if plan is None:
            return (_FULL,) * len(indices)
        # the longest prompt of the batch: its row is the last to be generated
        first = None if prompt_len is None else int(torch.as_tensor(prompt_len).max())
        if first is not None and memories[0].get_seq_length() < first:
            return None
        phase = "prefill" if first is None else "decode"
        return tuple([plan.mode(index, phase) for index in indices])

    def _turns_alike(self, model: Any, cache: Cache) -> bool:
        """Tell whether one table has the angles of all rows, up to the new token."""
        rope, chosen = model.rotary_emb.rope_type, frequencies_of(cache)
        if rope in _STATIC_ROPE:
            return True
        if chosen is None or chosen.inv_freq.ndim > 1:
            self._tell(model, f"rotary embedding {rope!r} turns a position by more than one angle")
            return False
        # beyond what they were chosen for the model says what is wrong
        return chosen.columns is None or cache.get_seq_length() < chosen.columns

    def _steps(
        self,
        model: Any,
        plan: AttentionPlan | None,
        memories: list[Memory],
        modes: tuple[Mode, ...],
    ) -> list[Step] | None:
        """Return what each layer launches; None where one cannot be recorded, and say why once."""
        steps = []
        for layer, memory, mode in zip(model.layers, memories, modes):
            if served_objection(layer.self_attn.layer_idx, memory, plan) is not None:
                return None  # the model raises it
            step = mode.step(memory, _step_layer(layer, mode))
            if isinstance(step, str):
                index = layer.self_attn.layer_idx
                self._tell(model, f"attention {mode.name!r} of layer {index}: {step}")
                return None
            steps.append(step)
        return steps

    def _tell(self, model: Any, objection: str) -> None:
        if not self._told:
            self._told = True
            logger.info("%s launches each kernel of a decode step: %s", model.kind, objection)


def _step_layer(layer: Any, mode: Mode) -> StepLayer:
    fusion, attention = layer.fusion, layer.self_attn
    return StepLayer(
        index=attention.layer_idx,
        heads=fusion.heads,
        kv_heads=fusion.kv_heads,
        scale=attention.scaling,
        module=getattr(attention, mode.name, None),
    )


def _can_record(device: torch.device) -> bool:
    if torch.is_grad_enabled():
        return False
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()  # somebody else records
    return device.type == "cpu"


def _memories(model: Any, indices: Sequence[int], cache: Cache, B: int) -> list[Memory] | None:
    """Return the memory of each layer, in the order of the layers; None where one is not ready."""
    layers: list[Any] = cache.layers
    if len(layers) != len(indices):
        return None
    weight, columns = model.norm.weight, cache.get_seq_length()
    dtype, device = weight.dtype, weight.device
    # by the index of each layer, as the layer itself finds it
    memories = [layers[index] for index in indices]
    for memory in memories:
        if not isinstance(memory, Memory) or not memory.is_ready(B, dtype, device):
            return None
        if memory.get_seq_length() != columns:
            return None
    return memories


def _describe(
    model: Any,
    plan: AttentionPlan | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    B: int,
    memories: list[Memory],
    prompt_len: int | Tensor | None,
    frequencies: Tensor,
) -> Call | None:
    """Describe a step to the memories; None where padding to the left and positions are not all."""
    columns = memories[0].get_seq_length()
    padding: Tensor | None = None
    if attention_mask is not None and not attention_mask.all():
        if attention_mask.shape != (B, columns + 1):
            return None
        padding = columns + 1 - attention_mask.count_nonzero(1)
        seen = torch.arange(columns + 1, device=padding.device) >= padding[:, None]
        if not torch.equal(seen, attention_mask != 0):
            return None
    position: int | Tensor = columns
    if position_ids is not None:
        if position_ids.ndim != 2:
            return None
        position = position_ids[:, 0]
    leftpad = None if padding is None else padding.int()
    call = Call(columns, leftpad, position, frequencies, prompt_len)
    shift = begin_call(memories, call)
    if plan is None or not plan.counts_positions:
        return call
    if position_ids is not None:
        return None  # refused by the model, by name
    for lag in (leftpad, shift):
        position = position if lag is None else position - lag
    if isinstance(position, Tensor):
        position = position.clamp_min(0)
    return Call(columns, leftpad, position)
