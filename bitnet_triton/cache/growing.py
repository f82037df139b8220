"""A cache layer that grows in place, with memory to spare: a step copies its own tokens only."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from bitnet_triton.cache.key_values import KeyValueMemory, may_write
from bitnet_triton.cache.memory import Call
from bitnet_triton.runtime.huge_pages import in_huge_pages

_FEWEST = 256  # tokens that are added to the memory at least


class GrowingLayer(DynamicLayer, KeyValueMemory):
    """transformers' ``DynamicLayer`` without its copy of the whole cache in every step.

    ``keys`` and ``values`` [B Hk T D] are the first T tokens of ``key_store`` and ``value_store``
    [B Hk capacity D]. New tokens are written behind them; when the memory is full, it grows by a
    quarter. What else a layer can do (crop, reorder, repeat) replaces ``keys`` and ``values`` as in
    the base class; memory is found for the result at the next update. With gradients it
    concatenates, as the base class does, because graphs may still need the shorter tensors.
    """

    is_savable: ClassVar[bool] = True
    is_plain: ClassVar[bool] = True
    key_store: Tensor | None = None
    value_store: Tensor | None = None
    # the views that the last update made: as long as they are held, the stores begin with them
    _views: tuple[Tensor | None, Tensor | None] = (None, None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take a subclass for one that keeps more, unless it says otherwise."""
        super().__init_subclass__(**kwargs)
        cls.is_plain = vars(cls).get("is_plain", False)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D]; return all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), key_states.shape[-2]
        if start == 0:
            self._start_empty(key_states, value_states)
        self.reserve(new)
        assert self.key_store is not None
        assert self.value_store is not None
        self.key_store[:, :, start : start + new].copy_(key_states)
        self.value_store[:, :, start : start + new].copy_(value_states)
        self.advance(new)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

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

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens behind those that the layer holds.

        Until then, or until the layer is changed by something else than ``update``, the stores
        stay where they are in memory.
        """
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._views
        if self.keys is keys and self.values is values:
            assert self.key_store is not None
            if keys.shape[-2] + new <= self.key_store.shape[-2] and may_write(self.key_store):
                return
        capacity = self.capacity(self.keys.shape[-2], new)
        self.key_store = _with_room(self.keys, self.key_store, new, capacity)
        self.value_store = _with_room(self.values, self.value_store, new, capacity)
        self.advance(0)  # what is held lies there from now on

    def capacity(self, held: int, new: int) -> int:
        """Return how many slots a store gets that holds so many tokens, and is to take new ones."""
        return held + max(new, held // 4, _FEWEST)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, which somebody has written into the stores."""
        assert self.keys is not None
        assert self.key_store is not None
        assert self.value_store is not None
        length = self.keys.shape[-2] + new
        self.keys = self.key_store.narrow(2, 0, length)
        self.values = self.value_store.narrow(2, 0, length)
        self._views = self.keys, self.values

    def saved(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs to make the layer again."""
        assert self.keys is not None
        assert self.values is not None
        saved = {"keys": self.keys, "values": self.values}
        leftpad = getattr(self, "leftpad", None)
        return saved if leftpad is None else {**saved, "leftpad": leftpad}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what ``saved`` has told; the layer is empty."""
        # whatever a layer makes of tokens, it makes anew
        self.begin(Call(0, saved.get("leftpad")))
        self.update(saved["keys"], saved["values"])

    def can_take_back(self, n: int) -> bool:
        """It holds everything."""
        return True

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self.key_store = self.value_store = None
        self._views = None, None

    def _start_empty(self, key_states: Tensor, value_states: Tensor) -> None:
        """Give ``keys`` and ``values`` of no tokens their other sizes."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]


def grow_in_place(cache: Cache) -> None:
    """Turn the plain layers of a cache of transformers into ones that grow in place."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer  # which only adds: what it holds stays


def _with_room(held: Tensor, store: Tensor | None, new: int, capacity: int) -> Tensor:
    """Return a store that begins with ``held`` and has room for ``new`` tokens behind it.

    Where ``store`` is none, it is a fresh one of ``capacity`` slots.
    """
    B, Hk, length, D = held.shape
    fits = store is not None and _begins_with(store, held) and length + new <= store.shape[-2]
    if store is not None and fits and may_write(store):
        return store
    larger = in_huge_pages(held.new_empty((B, Hk, capacity, D)))
    larger[:, :, :length].copy_(held)
    return larger


def _begins_with(store: Tensor, held: Tensor) -> bool:
    """Tell whether ``held`` is the first tokens of ``store``, in its memory."""
    (B, Hk, length, D), (*others, capacity, depth) = held.shape, store.shape
    if others != [B, Hk] or depth != D or length > capacity:
        return False
    return held.stride() == store.stride() and held.data_ptr() == store.data_ptr()
