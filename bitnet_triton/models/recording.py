"""The launches of one decode step of a fused model, on the memory of one cache.

What changes from step to step is read from memory: where the new token stands, how many tokens the
cache holds. Layers whose caches hold equally many share these numbers; there are several such
groups where some layers drop what has left a window.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.rms_norm.op import NORM_FWD
from bitnet_triton.kernels.rotary.op import ROTARY_AND_STORE
from bitnet_triton.models.fused_layer import FusedDecoderLayer
from bitnet_triton.models.fusion import Launchers, has_global_hooks, is_changed
from bitnet_triton.models.watch import Watch
from bitnet_triton.runtime import backend_objection, capture, forced_backend, select
from bitnet_triton.runtime.device import autocast_dtype

Stores = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What a decode step finds.

    Attributes:
        stores: keys and values [B Hk capacity D] of each layer.
        places: int32 [groups, 4, B] on the CPU, of each row: the slot of the new token in the
            cache, its position, where the padding on the left ends, and how many slots are in use
            with it.
        groups: of each layer.
        masks: of each layer.
    """

    stores: Stores
    places: Tensor
    groups: tuple[int, ...]
    masks: tuple[Mask, ...]


class Recording:
    """Runs a step by replaying launches.

    Attributes:
        graph: the launches.
    """

    # what inference mode creates could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, step: Step, launchers: Launchers) -> None:
        self._step = step
        self._weights = _weights(model)
        norm = model.norm.weight
        self._places = step.places.to(norm.device, copy=True)
        self._hidden = norm.new_zeros((step.places.shape[-1], norm.shape[0]))
        self._positions = max(2 * _last_position(step), model.config.max_position_embeddings)
        every = torch.arange(self._positions, device=norm.device)[None]
        self._angles = tuple(table[0] for table in model.rotary_emb(norm, every))
        if norm.device.type != "cpu":
            # kernels are compiled and loaded outside of a capture. What this writes into the cache
            # stands where the new token will
            self._record(model, launchers)
        with capture(norm.device) as self.graph:
            self._result = self._record(model, launchers)
        self._watch = Watch(model)

    def _record(self, model: Any, launchers: Launchers) -> Tensor:
        x = self._hidden
        for i, layer in enumerate(fused_layers(model)):
            x = layer.fusion.run(launchers, x, self._attend(layer, i))
        norm = select("rms_norm", NORM_FWD, x.device, model.norm.weight)
        return norm(x, model.norm.weight, model.norm.variance_epsilon)

    def _attend(self, layer: FusedDecoderLayer, index: int) -> Callable[[Tensor], Tensor]:
        # Triton is imported on first use
        from bitnet_triton.kernels.flash_attention.decode import launch_decode

        # the layout of ops, [B capacity Hk D]
        keys, values = (store.transpose(1, 2) for store in self._step.stores[index])
        slots, positions, leftpad, used = self._places[self._step.groups[index]]
        rotate = select("rotary_and_store", ROTARY_AND_STORE, keys.device)
        head_dim, scale = layer.fusion.attention.head_dim, layer.fusion.attention.scaling
        mask = self._step.masks[index]

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.view(qkv.shape[0], 1, -1, head_dim)
            q = rotate(heads, *self._angles, keys, values, slots, positions)
            out, _ = launch_decode(
                q, keys, values, mask=mask, scale=scale, leftpad_k=leftpad, seqused_k=used
            )
            return out.view(qkv.shape[0], -1)

        return attend

    def fits(self, step: Step) -> bool:
        """Tell whether it was recorded for such a step, on the memory of this cache."""
        return (
            step.places.shape == self._places.shape
            and step.groups == self._step.groups
            and step.masks == self._step.masks
            and same_stores(step.stores, self._step.stores)
            and _last_position(step) < self._positions
        )

    def is_untouched(self) -> bool:
        """Tell whether nothing at all has changed in the model; False says little."""
        return self._watch.holds()

    def has_weights_of(self, model: Any) -> bool:
        """Tell whether the weights that were recorded are still the model's."""
        if not _same_weights(_weights(model), self._weights):
            return False
        self._watch = Watch(model)  # what has changed does not matter, and need not be asked again
        return True

    def replay(self, model: Any, input_ids: Tensor, places: Tensor) -> Tensor:
        """Run a step; return hidden states [B 1 D].

        It writes behind what the cache holds, so a step may run again, or by other means.
        """
        self._hidden.copy_(model.embed_tokens(input_ids)[:, 0])
        # pinned, where there is a GPU: nothing waits, and PyTorch keeps it until it is copied
        self._places.copy_(places, non_blocking=True)
        self.graph.replay()
        return self._result.clone()[:, None]


def fused_layers(model: Any) -> Iterator[FusedDecoderLayer]:
    """Return the layers of a fused model."""
    return cast("Iterator[FusedDecoderLayer]", iter(model.layers))


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
    like_hidden = model.norm.weight.data  # a plain tensor of their dtype
    # a replay calls none of them. accelerate replaces a forward too: it moves weights in between
    if any(map(is_changed, (model.norm, model.rotary_emb, *model.layers))):
        return None
    dtype, (first, *others) = like_hidden.dtype, fused_layers(model)
    if not all(layer.fusion.stands_for(layer, dtype, {}) for layer in others):
        return None
    return first.fusion.launchers(first, like_hidden, {})


def same_stores(some: Stores, others: Stores) -> bool:
    """Tell whether both are the same tensors."""
    return len(some) == len(others) and all(
        a is c and b is d for (a, b), (c, d) in zip(some, others)
    )


def describe_places(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    B: int,
    columns: int,
    held: Sequence[int],
    pinned: bool = False,
) -> tuple[Tensor, tuple[int, ...], Tensor | None] | None:
    """Return ``places`` and ``groups`` of a step, and its padding; None where that is not all.

    Args:
        attention_mask: [B T] with the new token, or None.
        position_ids: [B 1], or None.
        B: rows of the batch.
        columns: tokens before the new one, padding included.
        held: how many of them each layer holds.
        pinned: whether ``places`` go to a GPU, which then reads them by itself.
    """
    lengths = sorted(set(held))
    places = torch.empty((len(lengths), 4, B), dtype=torch.int32, pin_memory=pinned)
    places[:, 1] = columns
    padding: Tensor | None = None
    if attention_mask is not None and not attention_mask.all():
        if attention_mask.shape != (B, columns + 1):
            return None
        padding = columns + 1 - attention_mask.count_nonzero(1)
        seen = torch.arange(columns + 1, device=padding.device) >= padding[:, None]
        if not torch.equal(seen, attention_mask != 0):
            return None
    if position_ids is not None:
        if position_ids.ndim != 2:
            return None
        places[:, 1] = position_ids[:, 0]
    for group, length in zip(places, lengths):
        group[0], group[3] = length, length + 1
        group[2] = 0 if padding is None else (padding - (columns - length)).clamp_min(0)
    groups = tuple([lengths.index(length) for length in held])
    return places, groups, None if padding is None else padding.int()


def _last_position(step: Step) -> int:
    return int(step.places[0, 1].max())


def _weights(model: Any) -> tuple[list[Any], list[Any]]:
    """Return what tells whether weights are where they were: tensors, and their addresses."""
    norm = model.norm.weight
    angles = list(model.rotary_emb.buffers())
    weights, addresses = [norm, *angles], [norm.dtype, norm.data_ptr()]
    addresses += [0 if angle.is_inference() else angle._version for angle in angles]
    for layer in fused_layers(model):
        more, places = layer.fusion.weights()
        weights += more
        addresses += places
    return weights, addresses


def _same_weights(some: tuple[list, list], others: tuple[list, list]) -> bool:
    return some[1] == others[1] and all(map(operator.is_, some[0], others[0]))
