"""A cache layer that keeps everything, and beside it what sums up neighbouring keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.cache.following import FollowingLayer
from bitnet_triton.cache.key_values import LEFTPAD, USED, may_write
from bitnet_triton.cache.memory import Call
from bitnet_triton.kernels import Units, pool_keys, pool_last_keys


class UnitsLayer(FollowingLayer):
    """Keys and values, with the units of keys by which modes choose blocks.

    A unit is made when its last token arrives, so one that is not whole is never there, and what
    ``crop`` takes back is made anew by the tokens that follow. Units count from the first token of
    a row that is no padding, and lie as ``Units`` says, in stores that grow with those of the keys.

    Args:
        units: which ones to keep.
        switches: lengths up to which the modes of the layer read everything: a recorded step is of
            one side of them.

    Attributes:
        leftpad: int32 [B], the first column that is no padding, or None; ``begin`` tells it.
    """

    def __init__(self, units: Iterable[Units], switches: Iterable[int] = ()) -> None:
        super().__init__()
        self.units = tuple(dict.fromkeys(units))
        self.switches = tuple(sorted({n for n in switches if n > 0}))
        self.unit_stores: dict[Units, Tensor] = {}
        self.leftpad: Tensor | None = None
        self._summed = 0  # columns of which the units are made
        self._padding: int | None = None  # of the row with the most of it
        self._sides = torch.empty(0), torch.empty(0)

    @property
    def is_decoding(self) -> bool:
        """Whether the tokens of the call were generated."""
        return self._is_told

    def begin(self, call: Call) -> None:
        """Note the padding of a call."""
        super().begin(call)
        self.leftpad = call.leftpad

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D], and make the units that they complete."""
        if not self.is_known:
            self._summed = 0  # somebody has replaced them
        summed = self._summed
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._is_stored():
            self._sum_up(summed)
        else:
            self.unit_stores, self._summed = {}, 0  # with gradients it has no stores
        self._known = self.keys
        return keys, values

    def sums(self, units: Units) -> Tensor:
        """Return the units of what is held, [B U Hk D or 2 D]."""
        if units in self.unit_stores and self._is_stored():
            return self.unit_stores[units]
        assert self.keys is not None
        return pool_keys(self.keys.transpose(1, 2), units=units, leftpad=self.leftpad)

    def is_dense(self, switch: int) -> bool | None:
        """Tell whether the next token of every row stands below ``switch``; None: of some rows."""
        if self.held < switch or self.leftpad is None:
            return self.held < switch
        if self._padding is None:
            self._padding = int(self.leftpad.max()) if self.leftpad.numel() else 0
        return False if self.held - self._padding >= switch else None

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether a step can be recorded: not where some rows read everything, others not."""
        if not super().is_ready(B, dtype, device):
            return False
        return all(self.is_dense(switch) is not None for switch in self.switches)

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens and for their units."""
        super().reserve(new)
        keys = self.stores[0]
        for units in self.units:
            store = self.unit_stores.get(units)
            rows = units.rows(keys.shape[2])
            if store is not None and store.shape[1] == rows and may_write(store):
                continue
            B, Hk, _, D = keys.shape
            larger = keys.new_zeros(B, rows, Hk, units.width(D))
            if store is not None:
                kept = min(rows, store.shape[1])
                larger[:, :kept] = store[:, :kept]
            self.unit_stores[units] = larger

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores, and what tells the phase and the sides of the next token."""
        sides = (self._sides[self.held >= switch] for switch in self.switches)
        phase = self._sides[self.is_decoding]
        return (*super().address(), *self.unit_stores.values(), *sides, phase)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, whose units ``write`` has made."""
        super().advance(new)
        if new and self._summed == self.held - new:
            self._summed = self.held
            self._known = self.keys

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate and store the new token, and make the units that it completes."""
        from bitnet_triton.kernels.top_blocks.pool import launch_pool_keys

        q = super().write(heads, cos, sin, places)
        keys = self.stores[0].transpose(1, 2)
        for units, store in self.unit_stores.items():
            launch_pool_keys(
                keys, store, units=units, last=1, leftpad=places[LEFTPAD], used=places[USED]
            )
        return q

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens; their units are made anew when others take their place."""
        is_known = self.is_known
        super().crop(tokens_to_remove)
        if is_known:
            self._known, self._summed = self.keys, min(self._summed, self.held)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.unit_stores, self._summed = {}, 0
        self._padding = self.leftpad = None

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        self.unit_stores = {units: change(store) for units, store in self.unit_stores.items()}
        if self.leftpad is not None:
            self.leftpad = change(self.leftpad)
        super()._change_rows(change, is_known)

    def _is_stored(self) -> bool:
        """Tell whether what is held lies in the stores."""
        return self.keys is not None and self.keys is self._views[0]

    def _sum_up(self, start: int) -> None:
        """Make the units that are not made yet of tokens from ``start`` on."""
        new, keys = self.held - start, self.stores[0].transpose(1, 2)[:, : self.held]
        for units, store in self.unit_stores.items():
            last = min(new // units.stride + 1, units.rows(self.held))
            if last:
                pool_last_keys(keys, store, units=units, last=last, leftpad=self.leftpad)
        self._summed = self.held
