"""The launches of one decode step of a fused model, on the memories of one cache.

What changes from step to step is read from memory: where the new token stands, how many tokens are
held. Layers whose memories tell equal numbers share them; there are several such groups where some
layers drop what has left a window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from bitnet_triton.attention import Mode
from bitnet_triton.attention.mode import Step, StepTensors
from bitnet_triton.cache import Call, Memory
from bitnet_triton.kernels.rms_norm.op import NORM_FWD
from bitnet_triton.models.fused.changes import Changes
from bitnet_triton.models.fused.fusion import Launchers, has_global_hooks, is_changed
from bitnet_triton.models.fused.layer import FusedDecoderLayer
from bitnet_triton.models.rotary import Frequencies
from bitnet_triton.runtime import backend_objection, capture, forced_backend, select
from bitnet_triton.runtime.device import autocast_dtype

# Angles are there from the start for so many; beyond, for twice as many as there are
_POSITIONS = 32768


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """What a decode step finds.

    Attributes:
        modes: of each layer.
        addresses: of the memory of each layer.
        places: int32 [rows B] on the CPU, what the memories tell, group below group.
        rows: of each layer, which rows of ``places`` are those of its memory.
        last_position: the largest one that is read, in the rotary embedding.
        frequencies: by which the cache is turned, where they had to be chosen.
    """

    modes: tuple[Mode, ...]
    addresses: list[tuple[Tensor, ...]]
    places: Tensor
    rows: tuple[slice, ...]
    last_position: int
    frequencies: Frequencies | None = None

    @classmethod
    def build(
        cls,
        call: Call,
        memories: Sequence[Memory],
        modes: tuple[Mode, ...],
        addresses: list[tuple[Tensor, ...]],
        pinned: bool,
        frequencies: Frequencies | None = None,
    ) -> RecordedStep:
        """Ask the memories for their places, once where several would tell the same."""
        # numbers of one memory say nothing about another that tells other places
        keys = [(type(memory).places, memory.places_key()) for memory in memories]
        parts: dict[Any, Tensor] = {}
        position = call.position
        last = int(position.max()) if isinstance(position, Tensor) else position
        for key, memory in zip(keys, memories):
            if key not in parts:
                parts[key] = memory.places(call)
                last = max(last, memory.last_position())
        starts, count = {}, 0
        for key, part in parts.items():
            starts[key] = slice(count, count + part.shape[0])
            count += part.shape[0]
        B = next(iter(parts.values())).shape[-1]
        # pinned, a GPU reads them by itself: nothing waits
        places = torch.empty((count, B), dtype=torch.int32, pin_memory=pinned)
        torch.cat(list(parts.values()), out=places)
        rows = tuple([starts[key] for key in keys])
        return cls(modes, addresses, places, rows, last, frequencies)


class Recording:
    """Runs a step by replaying launches.

    Attributes:
        graph: the launches.
        modes: of each layer.
        indices: by which each layer finds its memory.
        changes: asked before each step whether the model is still what was recorded.
    """

    # what inference mode creates could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, model: Any, step: RecordedStep, steps: Sequence[Step], launchers: Launchers
    ) -> None:
        self.modes, self.indices = step.modes, layer_indices(model)
        self._step = step
        norm = model.norm.weight
        self._places = step.places.to(norm.device, copy=True)
        self._hidden = norm.new_zeros((step.places.shape[-1], norm.shape[0]))
        turns = any(mode.takes_rotated for mode in step.modes)
        wanted = max(2 * step.last_position, min(model.config.max_position_embeddings, _POSITIONS))
        # where nothing is turned, a table would be all that grows with the text
        self._positions = wanted if turns else sys.maxsize
        every = torch.arange(wanted if turns else 1, device=norm.device)[None]
        with nullcontext() if step.frequencies is None else step.frequencies.in_use():
            cos, sin = model.rotary_emb(norm, every)
        self._angles = cos[0], sin[0]
        if norm.device.type != "cpu":
            # kernels are compiled and loaded outside of a capture. What this writes into the cache
            # stands where the new token will
            self._record(model, steps, launchers)
        with capture(norm.device) as self.graph:
            self._result = self._record(model, steps, launchers)
        self.changes = Changes(model)

    def _record(self, model: Any, steps: Sequence[Step], launchers: Launchers) -> Tensor:
        x = self._hidden
        for layer, step, rows in zip(fused_layers(model), steps, self._step.rows):
            x = layer.fusion.run(launchers, x, self._attend(layer, step, self._places[rows]))
        norm = select("rms_norm", NORM_FWD, x.device, model.norm.weight)
        return norm(x, model.norm.weight, model.norm.variance_epsilon)

    def _attend(
        self, layer: FusedDecoderLayer, step: Step, places: Tensor
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        head_dim = layer.fusion.attention.head_dim

        def attend(qkv: Tensor, normed: Tensor | None) -> Tensor:
            heads = qkv.view(qkv.shape[0], 1, -1, head_dim)
            hidden = None if normed is None else normed[:, None]
            cos, sin = self._angles
            return step(StepTensors(heads, cos, sin, places, hidden)).view(qkv.shape[0], -1)

        return attend

    def fits(self, step: RecordedStep) -> bool:
        """Tell whether it was recorded for such a step, on these memories."""
        mine = self._step
        return (
            step.places.shape == self._places.shape
            and step.rows == mine.rows
            and step.modes == mine.modes
            and step.frequencies is mine.frequencies
            and step.last_position < self._positions
            and same_tensors(step.addresses, mine.addresses)
        )

    def replay(self, model: Any, input_ids: Tensor, step: RecordedStep) -> Tensor:
        """Run a step; return hidden states [B 1 D]."""
        self._hidden.copy_(model.embed_tokens(input_ids)[:, 0])
        # pinned, where there is a GPU: nothing waits, and PyTorch keeps it until it is copied
        self._places.copy_(step.places, non_blocking=True)
        self.graph.replay()
        return self._result.clone()[:, None]


def fused_layers(model: Any) -> Iterator[FusedDecoderLayer]:
    """Return the layers of a fused model."""
    return cast("Iterator[FusedDecoderLayer]", iter(model.layers))


def layer_indices(model: Any) -> list[int]:
    """Return the index by which each layer finds its memory and its modes."""
    return [layer.self_attn.layer_idx for layer in model.layers]


def same_tensors(some: list[tuple[Tensor, ...]], others: list[tuple[Tensor, ...]]) -> bool:
    """Tell whether both hold the same tensors, by identity."""
    if list(map(len, some)) != list(map(len, others)):
        return False
    return all(map(is_, chain.from_iterable(some), chain.from_iterable(others)))


def can_replay(device: torch.device) -> bool:
    """Tell whether Triton's kernels run as they would in a model: only these are recorded."""
    return (
        forced_backend() in (None, "triton")
        and backend_objection("triton", device) is None
        and autocast_dtype(device.type) is None
        and not has_global_hooks()
    )


def launchers_of(model: Any) -> Launchers | None:
    """Return what every layer runs; None where one of them has objections."""
    # a plain tensor of their dtype; as of a prompt, so that all of a layer is looked at
    like_hidden = model.norm.weight.data.expand(1, 2, -1)
    # a replay calls none of them. accelerate replaces a forward too: it moves weights in between
    if any(map(is_changed, (model.norm, model.rotary_emb, *model.layers))):
        return None
    found = [layer.fusion.launchers(layer, like_hidden, {}) for layer in fused_layers(model)]
    if any(each is None for each in found):
        return None
    # a merge is no launch: what has changed since the last step is merged before. Layers that share
    # a linear would take it from each other in every step
    for layer in fused_layers(model):
        layer.fusion.merge()
    is_merged = all(layer.fusion.is_merged for layer in fused_layers(model))
    return found[0] if is_merged else None
