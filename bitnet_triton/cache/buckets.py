"""Cache layers that keep what hashing makes of keys beside them: each key is hashed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.following import FollowingLayer
from bitnet_triton.cache.key_values import SLOT, may_write

# Writes the numbers of one token a row, by launches alone: keys [B T Hk D], numbers [B Hk R T] and
# which token, int32 [B]
HashStep = Callable[[Tensor, Tensor, Tensor], None]


class BucketsLayer(FollowingLayer):
    """Keys and values, with the number of the bucket of each key in each round.

    Whoever attends hashes the keys that have no numbers yet (``take_in``), which are those of the
    call; recorded steps write those of their token, once somebody has told how (``follow``). Tokens
    that nobody has hashed, because another mode has answered them, are hashed by the next who asks.

    Args:
        rounds: how many numbers a key has in each head.
        owner: whose numbers these are: others have no use for them.

    Attributes:
        number_store: int32 [B Hk R capacity]; None before the first tokens.
        numbered: how many tokens have numbers.
    """

    dtype_of_numbers: ClassVar[torch.dtype] = torch.int32

    def __init__(self, rounds: int, owner: Hashable) -> None:
        super().__init__()
        self.rounds, self.owner = rounds, owner
        self.number_store: Tensor | None = None
        self.numbered = 0
        self._hash_step: HashStep | None = None
        self._phases = torch.empty(0), torch.empty(0)

    @property
    def is_numbered(self) -> bool:
        """Whether every token has its numbers."""
        return self.is_known and self.numbered == self.held

    def take_in(self, numbers_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the numbers of all tokens, int32 [B Hk R T].

        Args:
            numbers_of: maps those keys [B new Hk D] that have none to int32 [B new Hk R].
        """
        assert self.keys is not None
        if not self.is_known:
            self.numbered = 0  # somebody has replaced them
        start, end = self.numbered, self.held
        store = self._with_room()
        if start < end:
            new = numbers_of(self.keys[:, :, start:].transpose(1, 2))
            store[..., start:end] = new.permute(0, 2, 3, 1)
        self.numbered, self._known = end, self.keys
        return store[..., :end]

    def follow(self, hash_step: HashStep) -> None:
        """Let ``write`` make the numbers of its token from now on."""
        self._hash_step = hash_step

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D]; their numbers are taken in by whoever asks."""
        is_known, numbered = self.is_known, self.numbered
        result = super().update(key_states, value_states, *args, **kwargs)
        self.numbered = numbered
        self._keep(is_known)
        return result

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens and their numbers."""
        is_known = self.is_known
        super().reserve(new)
        self._keep(is_known)
        self._with_room()

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores, and what tells whether tokens have numbers and get them."""
        assert self.number_store is not None
        told = self._phases[self.is_numbered], self._phases[self._hash_step is not None]
        return (*super().address(), self.number_store, *told)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, whose numbers ``write`` has made."""
        is_known, follows = self.is_known, self._hash_step is not None
        goes_on = follows and self.numbered == self.held
        super().advance(new)
        if goes_on:
            self.numbered = self.held
        self._keep(is_known)

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate and store the new token, and write its numbers."""
        q = super().write(heads, cos, sin, places)
        if self._hash_step is not None:
            assert self.number_store is not None
            self._hash_step(self.stores[0].transpose(1, 2), self.number_store, places[SLOT])
        return q

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens."""
        is_known = self.is_known
        super().crop(tokens_to_remove)
        self.numbered = min(self.numbered, self.held)
        self._keep(is_known)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.number_store, self.numbered = None, 0

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        if self.number_store is not None:
            self.number_store = change(self.number_store)
        super()._change_rows(change, is_known)

    def _with_room(self) -> Tensor:
        """Return the store, with room for as many tokens as those of the keys."""
        keys, store = self.keys, self.number_store
        assert keys is not None
        B, Hk, room = *keys.shape[:2], keys.shape[2]
        if keys is self._views[0] and self.key_store is not None:
            room = self.key_store.shape[2]  # with gradients it has no stores
        fits = store is not None and store.shape[0] == B and store.shape[-1] >= room
        if store is not None and fits and may_write(store):
            return store
        larger = keys.new_zeros((B, Hk, self.rounds, room), dtype=self.dtype_of_numbers)
        if store is not None and self.numbered:
            larger[..., : self.numbered] = store[..., : self.numbered]
        self.number_store = larger
        return larger


class SignsLayer(BucketsLayer):
    """Keys and values, with packed signs of the keys around the mean of those of a prompt.

    ``number_store`` is int16 [B Hk W capacity], W words of sixteen channels. Signs are packed when
    somebody asks for them; the mean stays that of the prompt until some of it is taken back.

    Args:
        owner: whose signs these are.

    Attributes:
        centre: float32 [B Hk D], that mean; None before somebody asks.
    """

    dtype_of_numbers: ClassVar[torch.dtype] = torch.int16

    def __init__(self, owner: Hashable) -> None:
        super().__init__(0, owner)  # the first tokens tell how many words they have
        self.centre: Tensor | None = None
        self._centred = 0  # tokens that it is the mean of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn from the first tokens how many words a key has."""
        super().lazy_initialization(key_states, value_states)
        self.rounds = -(-key_states.shape[-1] // 16)

    def signs(
        self, prompt: int, centre_of: Callable[[Tensor], Tensor], pack: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the signs of all tokens, int16 [B Hk W T], and the centre.

        Args:
            prompt: how many of the tokens belong to it.
            centre_of: maps their keys [B T Hk D] to float32 [B Hk D].
            pack: maps keys [B T Hk D] and that to int16 [B Hk W T].
        """
        assert self.keys is not None
        if self.centre is None or not self.is_known or self._centred != prompt:
            self.centre = centre_of(self.keys[:, :, :prompt].transpose(1, 2))
            self._centred, self.numbered = prompt, 0
        centre = self.centre
        return self.take_in(lambda new: pack(new, centre).permute(0, 3, 1, 2)), centre

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, and the mean with the first one of the prompt."""
        super().crop(tokens_to_remove)
        if self.held < self._centred:
            self.centre, self._centred, self.numbered = None, 0, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.centre, self._centred = None, 0

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        super()._change_rows(change, is_known)
        if self.centre is not None:
            self.centre = change(self.centre)
