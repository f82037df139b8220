"""A cache layer that keeps everything, and compressed keys and values of it beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.growing import GrowingLayer
from bitnet_triton.cache.key_values import POSITION, may_write
from bitnet_triton.cache.memory import Call
from bitnet_triton.kernels import Mask

POSITIONS = "positions"
_FEWEST = 64  # places that are added to a store at least


class CompressedLayer(GrowingLayer):
    """Everything that a ``GrowingLayer`` keeps, and what a mode makes of it as tokens come.

    A mode takes tokens in after ``update`` has stored their keys and values: it writes their blocks
    into the stores that ``room`` gives it, and says by ``take_in`` how far it has come. Blocks are
    counted from the first real token of each row, so what is valid of them follows from the number
    of tokens. Tokens that nobody has taken in yet, because another mode has read them, are taken in
    by the next call. By ``place`` it hears of each call where the rotary embedding has put the
    tokens: keys of a block are turned back by that.

    Args:
        block: tokens of a compression block.
        stride: from one to the next.

    Attributes:
        taken: how many tokens, padding included, have been taken in.
        more: further stores by name, [B Hk capacity D]: "compressed_keys" and "compressed_values"
            have a place for each block, all others one for each token; "positions", int32 with one
            head of one entry, says where the rotary embedding has put it.
        placed: of how many tokens, padding included, the positions are known.
    """

    is_savable: ClassVar[bool] = False  # files have no word for compressed blocks

    def __init__(self, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.taken = self.placed = 0
        self.more: dict[str, Tensor] = {}
        self._last_position: int | None = None  # once somebody has looked

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D]; return all of them."""
        known = self.taken, self.placed
        found = super().update(key_states, value_states, *args, **kwargs)
        self.taken, self.placed = known  # somebody still has to tell of them
        return found

    def place(self, positions: Tensor) -> Tensor:
        """Keep the positions [B or 1, T] of the latest T tokens; to do it again changes nothing.

        Returns:
            Those of all tokens, int32 [B held].

        Raises:
            ValueError: of tokens before them nobody has told.
        """
        assert self.keys is not None
        end = self.held
        start = end - positions.shape[1]
        if self.placed < start:
            raise ValueError(
                f"`past_key_values`: of tokens {self.placed} to {start} no positions are known; "
                "they were taken in under another attention"
            )
        new = positions.int().expand(self.keys.shape[0], -1)[..., None, None]  # [B T 1 1]
        store = self.room(POSITIONS, new, end)[:, 0, :, 0]
        store[:, start:end] = new[..., 0, 0]
        self.placed, self._last_position = end, None
        return store[:, :end]

    def last_position(self) -> int:
        """Return the largest one; waits for the device once after ``place``."""
        if self._last_position is None:
            self._last_position = int(self.more[POSITIONS][:, :, : self.placed].max())
        return self._last_position

    def places(self, call: Call) -> Tensor:
        """Return slot, position, padding and length of each row, int32 [4 B]."""
        places = super().places(call)
        self._last_position = max(self.last_position(), int(places[POSITION].max()))
        return places

    def take_in(self) -> None:
        """Count all tokens that are held as taken in."""
        self.taken = self.held

    def blocks(self, tokens: int) -> int:
        """Return how many blocks there may be of ``tokens`` tokens."""
        return max(tokens - self.block + self.stride, 0) // self.stride

    def room(self, name: str, like: Tensor, places: int) -> Tensor:
        """Return a store [B Hk capacity D] with as many places at least, to be written to.

        Args:
            name: of the store; one that is not there yet is made.
            like: [B T Hk D], of its dtype, on its device.
            places: that are needed; what is held in them stays.
        """
        store = self.more.get(name)
        if store is not None and store.shape[0] != like.shape[0]:
            store = None  # of another batch
        if store is not None and store.shape[2] >= places and may_write(store):
            return store
        held = 0 if store is None else store.shape[2]
        capacity = max(places, held)
        if capacity > held:
            capacity += max(capacity // 4, _FEWEST)
        (B, Hk), D = (like.shape[0], like.shape[2]), like.shape[-1]
        # what is not yet written has to be finite: it may be multiplied with a weight of 0
        larger = torch.zeros((B, Hk, capacity, D), dtype=like.dtype, device=like.device)
        if store is not None:
            larger[:, :, :held] = store
        self.more[name] = larger
        return larger

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it holds tokens of B rows, all of them taken in."""
        return self.taken == self.placed == self.held and super().is_ready(B, dtype, device)

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens behind those that the layer holds, and for their blocks."""
        known = self.taken, self.placed
        super().reserve(new)
        self.taken, self.placed = known
        tokens = self.held + new
        for name, store in list(self.more.items()):
            places = self.blocks(tokens) if name.startswith("compressed") else tokens
            self.room(name, store.transpose(1, 2), max(places, 1))

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say that a mode which compresses nothing has no recorded step here."""
        return "its cache keeps compressed blocks, which a recorded step of this mode does not make"

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held and taken in, which somebody has written."""
        super().advance(new)
        self.taken += new
        self.placed += new

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores."""
        return (*super().address(), *self.more.values())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says."""
        super().crop(tokens_to_remove)
        self.taken = min(self.taken, self.get_seq_length())
        self.placed = min(self.placed, self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self.taken = self.placed = 0
        self.more = {}
        self._last_position = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        super().batch_select_indices(indices)
        self._change_rows(lambda t: t[indices.to(t.device)])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.more = {name: change(store) for name, store in self.more.items()}
