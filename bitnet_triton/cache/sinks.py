"""Cache layers of transformers that hold no more than a window and the first tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitnet_triton.cache.key_values import KeyValueMemory
from bitnet_triton.cache.memory import Call


class SinkWindowLayer(DynamicLayer, KeyValueMemory):
    """Keys and values of the first tokens and of the latest ones.

    A text that outgrows them loses what stands between. What is left lies in order and without a
    gap, so that a mask which counts the first keys from the start and a window from the end fits it
    as it is. Memory is written in place and moved once in many steps, so it is a quarter larger
    than what has to be kept.

    Args:
        recent: how many of the latest tokens to keep: a window has one key more, the query's own.
        sinks: how many of the first tokens to keep.

    Attributes:
        columns: tokens seen so far, padding included.
        leftpad: int32 [B], the first column that is no padding, or None; ``begin`` tells it before
            each ``update``: the first tokens are those of each row.
    """

    is_sliding = True
    keys: Any  # [B Hk slots D]; None before the first tokens
    values: Any

    def __init__(self, recent: int, sinks: int = 0) -> None:
        super().__init__()
        for name, value in (("recent", recent), ("sinks", sinks)):
            if value < 0:
                raise ValueError(f"`{name}`: expected at least 0, got {value}")
        self.recent, self.sinks = recent, sinks
        self.slack = max(16, (recent + sinks) // 4)
        self.columns = 0
        self.leftpad: Tensor | None = None
        self.record_past = False
        self._length = 0  # how many slots are in use

    @property
    def kept(self) -> int:
        """How many tokens a step needs."""
        return self.recent + self.sinks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and device; memory is allocated for the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def begin(self, call: Call) -> None:
        """Note the padding of a call."""
        self.leftpad = call.leftpad

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B Hk T D]; return them behind all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.columns += new
        if self._length and self._has_room(new) and self._may_write(key_states):
            end = self._length + new
            self.keys[..., self._length : end, :] = key_states
            self.values[..., self._length : end, :] = value_states
            self._length = end
            return self._held()
        keys, values = key_states, value_states
        if self._length:
            held_keys, held_values = self._held()
            keys = torch.cat([held_keys, keys], dim=-2)
            values = torch.cat([held_values, values], dim=-2)
        self._store(keys, values, everything=self.record_past)
        return keys, values

    def _held(self) -> tuple[Tensor, Tensor]:
        return self.keys[..., : self._length, :], self.values[..., : self._length, :]

    @property
    def held(self) -> int:
        """How many slots of the stores are in use."""
        return self._length

    @property
    def stores(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B Hk capacity D], as ``reserve`` has left them."""
        return self.keys, self.values

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens behind those that the layer holds.

        Forgets what lies between the first tokens and the latest ones where memory is full; the
        stores stay where they are, once they have their full size.
        """
        if not self._has_room(new):
            self._store(*self._held(), everything=self.record_past, room=max(new, self.slack))

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, which somebody has written into the stores."""
        self.columns += new
        self._length += new

    def _has_room(self, new: int) -> bool:
        return self._length + new <= self.keys.shape[-2]

    def _may_write(self, key_states: Tensor) -> bool:
        if key_states.requires_grad or self.keys.requires_grad:
            return False  # a step before may need what it read
        # inference mode marks its tensors: nobody else may write to them
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def _store(
        self, keys: Tensor, values: Tensor, everything: bool, room: int | None = None
    ) -> None:
        """Take over keys and values [B Hk T D]: what is kept of them, in memory of our own.

        Behind them is ``room`` for further tokens, by default ``slack``.
        """
        T, room = keys.shape[-2], self.slack if room is None else room
        length = T if everything else min(T, self.kept)
        slots = self._slots(T, length, keys.device)
        kept = [_kept(t, slots, length) for t in (keys, values)]
        if self.keys.shape[-2] != length + room or not self._may_write(keys):
            self.keys, self.values = (_with_room(t, room) for t in kept)
        else:
            # in the same memory, of which what is kept may be a part
            for store, t in zip((self.keys, self.values), kept):
                store[..., :length, :] = t.clone() if slots is None else t
        self._length = length

    def _slots(self, T: int, length: int, device: torch.device) -> Tensor | None:
        """Return which of T slots to keep, [length] or [B length]; None: the last ones."""
        dropped = T - length
        if dropped == 0 or self.sinks == 0:
            return None
        slot = torch.arange(length, device=device)
        left = 0 if self.leftpad is None else self._held_padding(T)[:, None].clamp_max(dropped)
        # a row that is shorter than what is kept has its padding dropped first
        return torch.where(slot < self.sinks, slot + left, slot + dropped)

    def _held_padding(self, T: int) -> Tensor:
        """Return int [B]: how many of T slots, up to the latest token, are padding to the left."""
        assert self.leftpad is not None
        return (self.leftpad.to(self.device) - (self.columns - T)).clamp_min(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``update`` gives, and how many columns it lacks."""
        return self._length + query_length, self.columns - self._length

    def get_seq_length(self) -> int:
        """Return how many tokens were seen, kept or not."""
        return self.columns

    def get_max_length(self) -> int:
        """Return how many tokens are kept."""
        return self.kept

    def can_take_back(self, n: int) -> bool:
        """Only while everything is kept: ``update`` forgets what has just left the window."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep everything from now on until the next ``crop``: speculation takes tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says, or none for 0.

        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens that would be visible again are no longer there.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove`: expected at most 0, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        length = self._length + tokens_to_remove
        has_dropped = self.columns > self._length
        if length < 0 or (tokens_to_remove and has_dropped and length < self.kept):
            raise RuntimeError(
                f"`tokens_to_remove`: {-tokens_to_remove} of the latest tokens cannot be taken "
                "back, older ones were dropped; call `activate_past_recording` before"
            )
        self.columns += tokens_to_remove
        self._length = length
        if self.record_past and length > self.kept + self.slack:
            self._store(*self._held(), everything=False)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.leftpad = None
        self.is_initialized = False
        self.columns = self._length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        self._change_rows(lambda t: t.index_select(0, indices.to(t.device)))

    def _change_rows(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.leftpad is not None:
            self.leftpad = change(self.leftpad)


def _kept(t: Tensor, slots: Tensor | None, length: int) -> Tensor:
    """Return of t [B Hk T D] the slots that are kept; of None the last ``length``, as a view."""
    if slots is None:
        return t[..., t.shape[-2] - length :, :]
    if slots.ndim == 1:
        return t.index_select(-2, slots)
    return t.gather(-2, slots[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[-1]))


def _with_room(t: Tensor, room: int) -> Tensor:
    """Return a copy of t [B Hk T D] with ``room`` slots behind it."""
    copy = t.new_empty(*t.shape[:-2], t.shape[-2] + room, t.shape[-1])
    copy[..., : t.shape[-2], :] = t
    return copy
