"""A cache layer that keeps index keys beside keys and values: one short row a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.key_values import may_write
from bitnet_triton.cache.units import UnitsLayer
from bitnet_triton.kernels import Mask, Units

_LARGEST = 127


class IndexLayer(UnitsLayer):
    """Keys and values, with the index keys by which a mode chooses blocks.

    A mode makes them of the hidden states and adds those of each call behind the keys and values
    of it. They are kept as they are, or as int8 codes with one scale a token.

    Args:
        units: which units of keys to keep as well, for the mode of the other phase.
        switches: as in ``UnitsLayer``.
        codes: keep codes.
    """

    is_savable: ClassVar[bool] = False  # files have no word for index keys

    def __init__(self, units: Iterable[Units], switches: Iterable[int], codes: bool) -> None:
        super().__init__(units, switches)
        self.codes = codes
        self.index_store: Tensor | None = None  # [B capacity Hu Di]
        self.scale_store: Tensor | None = None  # float32 [B capacity Hu]
        self.indexed = 0  # tokens whose index keys are there

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D]; their index keys are added afterwards."""
        indexed = self.indexed
        result = super().update(key_states, value_states, *args, **kwargs)
        self.indexed = indexed
        return result

    def add_index(self, keys: Tensor) -> None:
        """Keep the index keys [B T Hu Di] of the latest T tokens; to do it again changes nothing.

        Raises:
            ValueError: there are tokens before them whose index keys nobody has added.
        """
        end = self.get_seq_length()
        start = end - keys.shape[1]
        if self.indexed < start:
            raise ValueError(
                f"`past_key_values`: tokens {self.indexed} to {start} have no index keys; they "
                "were taken in by a mode that makes none, or under another attention"
            )
        with torch.no_grad():
            keys = keys.detach()
            self._make_room(end, keys)
            assert self.index_store is not None
            if self.codes:
                assert self.scale_store is not None
                keys, scale = quantize_index(keys)
                self.scale_store[:, start:end] = scale
            self.index_store[:, start:end] = keys
        self.indexed = end

    def index(self) -> tuple[Tensor, Tensor | None]:
        """Return the index keys [B capacity Hu Di] and, of codes, their scales [B capacity Hu]."""
        assert self.index_store is not None
        return self.index_store, self.scale_store

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether a step can be recorded: every token has its index key."""
        return super().is_ready(B, dtype, device) and self.indexed == self.held

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens and for their index keys."""
        super().reserve(new)
        if self.index_store is not None:
            self._make_room(self.stores[0].shape[2], self.index_store)

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores."""
        extra = (t for t in (self.index_store, self.scale_store) if t is not None)
        return (*super().address(), *extra)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, whose index keys a step has written."""
        super().advance(new)
        if self.indexed == self.held - new:
            self.indexed = self.held

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say that a mode which makes no index keys has no recorded step here."""
        return "its cache keeps index keys, which a recorded step of this mode does not make"

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens."""
        super().crop(tokens_to_remove)
        self.indexed = min(self.indexed, self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.index_store = self.scale_store = None
        self.indexed = 0

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        super()._change_rows(change, is_known)
        if self.index_store is not None:
            self.index_store = change(self.index_store)
        if self.scale_store is not None:
            self.scale_store = change(self.scale_store)

    def _make_room(self, tokens: int, like: Tensor) -> None:
        """Let the stores have room for ``tokens``, as many as those of the keys if that is more."""
        if self._is_stored():
            tokens = max(tokens, self.stores[0].shape[2])
        store = self.index_store
        if store is not None and store.shape[1] >= tokens and may_write(store):
            return
        B, _, Hu, D = like.shape
        dtype = torch.int8 if self.codes else like.dtype
        self.index_store = _larger(store, (B, tokens, Hu, D), like, dtype)
        if self.codes:
            self.scale_store = _larger(self.scale_store, (B, tokens, Hu), like, torch.float32)


def quantize_index(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of keys [B T Hu Di] and their scales, float32 [B T Hu], one a row."""
    keys = keys.float()
    scale = keys.abs().amax(-1).clamp_min(1e-12) / _LARGEST
    return (keys / scale[..., None]).round().to(torch.int8), scale


def _larger(store: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: Any) -> Tensor:
    larger = like.new_zeros(shape, dtype=dtype)
    if store is not None:
        larger[:, : min(store.shape[1], shape[1])] = store[:, : shape[1]]
    return larger
