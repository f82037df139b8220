"""Cache layers of transformers that hold no more than a window and the first tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitnet_triton.cache.key_values import KeyValueMemory, may_write
from bitnet_triton.cache.memory import Call


class SinkWindowLayer(DynamicLayer, KeyValueMemory):
    """Keys and values of the first tokens and of the latest ones.

    A text that outgrows them loses what stands between. What is left lies in order and without a
    gap, so that a mask which counts the first keys from the start and a window from the end fits it
    as it is. Memory is written in place and moved once in many steps, so it is a quarter larger
    than what has to be kept: ``keys`` and ``values`` are what is held, the first slots of
    ``key_store`` and ``value_store``. Whoever replaces them is followed, with memory found anew.

    Args:
        recent: how many of the latest tokens to keep: a window has one key more, the query's own.
        sinks: how many of the first tokens to keep.

    Attributes:
        columns: tokens seen so far, padding included.
        leftpad: int32 [B], the first column that is no padding, or None; ``begin`` tells it before
            each ``update``: the first tokens are those of each row.
    """

    is_sliding = True
    keys: Any  # [B Hk held D]; None before the first tokens
    values: Any
    key_store: Tensor | None = None  # [B Hk capacity D]
    value_store: Tensor | None = None
    # the views that were made last: as long as they are held, the stores begin with them
    _views: tuple[Tensor | None, Tensor | None] = (None, None)

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

    @property
    def kept_window(self) -> tuple[int, int]:
        """Of how many of the latest and of the first tokens it has keys."""
        return self.recent, self.sinks

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
        held = self.held
        if held and self._has_room(new) and self._may_write(key_states):
            for store, t in zip(self.stores, (key_states, value_states)):
                store[..., held : held + new, :] = t
            self._show(held + new)
            return self.keys, self.values
        keys, values = key_states, value_states
        if held:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        self._store(keys, values, everything=self.record_past)
        return keys, values

    @property
    def held(self) -> int:
        """How many slots of the stores are in use."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def stores(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B Hk capacity D], as ``reserve`` has left them."""
        assert self.key_store is not None
        assert self.value_store is not None
        return self.key_store, self.value_store

    def _is_stored(self) -> bool:
        """Tell whether what is held lies in the stores: nobody has replaced it."""
        keys, values = self._views
        return keys is not None and self.keys is keys and self.values is values

    def _show(self, length: int) -> None:
        """Count the first ``length`` slots of the stores as held."""
        keys, values = self.stores
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        self._views = self.keys, self.values

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens behind those that the layer holds.

        Forgets what lies between the first tokens and the latest ones where memory is full; the
        stores stay where they are, once they have their full size.
        """
        if not self._has_room(new) or not may_write(self.keys):
            room = max(new, self.slack)
            self._store(self.keys, self.values, everything=self.record_past, room=room)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, which somebody has written into the stores."""
        self.columns += new
        self._show(self.held + new)

    def _has_room(self, new: int) -> bool:
        return self._is_stored() and self.held + new <= self.stores[0].shape[-2]

    def _may_write(self, key_states: Tensor) -> bool:
        if key_states.requires_grad or self.keys.requires_grad:
            return False  # a step before may need what it read
        return may_write(self.keys)

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
        is_full_size = self._is_stored() and self.stores[0].shape[-2] == length + room
        if not is_full_size or not self._may_write(keys):
            self.key_store, self.value_store = (_with_room(t, room) for t in kept)
        else:
            # in the same memory, of which what is kept may be a part
            for store, t in zip(self.stores, kept):
                store[..., :length, :] = t.clone() if slots is None else t
        self._show(length)

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
        return self.held + query_length, self.columns - self.held

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
        length = self.held + tokens_to_remove
        has_dropped = self.columns > self.held
        if length < 0 or (tokens_to_remove and has_dropped and length < self.kept):
            raise RuntimeError(
                f"`tokens_to_remove`: {-tokens_to_remove} of the latest tokens cannot be taken "
                "back, older ones were dropped; call `activate_past_recording` before"
            )
        self.columns += tokens_to_remove
        if self._is_stored():
            self._show(length)
        else:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
        if self.record_past and length > self.kept + self.slack:
            self._store(self.keys, self.values, everything=False)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.leftpad = self.key_store = self.value_store = None
        self._views = None, None
        self.is_initialized = False
        self.columns = 0

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
        if self._is_stored():
            length = self.held
            self.key_store, self.value_store = (change(store) for store in self.stores)
            self._show(length)
        elif self.is_initialized:
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
