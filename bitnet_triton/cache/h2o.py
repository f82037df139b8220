"""Heavy hitters and recent tokens: what has received most attention stays (H2O, arXiv:2306.14048).

A token's score is the attention that it has received from all queries since it came, summed over
the query heads that share its key. Plain sums favour old tokens, which more queries see: that is
the method; ``average`` divides by their number instead. What is evicted is gone, its score with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.evicting import EvictingLayer, check_budget
from bitnet_triton.cache.key_values import LEFTPAD, USED
from bitnet_triton.cache.memory import Attended, Memory
from bitnet_triton.cache.named import MemoryKind
from bitnet_triton.kernels import Mask, attention_mass
from bitnet_triton.kernels.flash_attention.operands import SinkQuery


@dataclass(frozen=True)
class H2O(MemoryKind):
    """The tokens that have received most attention, and the latest ones.

    Attributes:
        budget: rows that each head keeps, a number, or a share of the prompt's tokens.
        recent: share of the budget that goes to the latest tokens, 0 to 1.
        average: whether a token counts by the mean of what the queries since it came have given,
            instead of the sum.
    """

    evicts: ClassVar[bool] = True

    budget: float = 0.2
    recent: float = 0.5
    average: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if isinstance(self.recent, bool) or not isinstance(self.recent, (int, float)):
            got = type(self.recent).__name__
            raise TypeError(f"`cache`: 'recent': expected a number, got {got}")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"`cache`: 'recent': expected 0 to 1, got {self.recent}")
        if not isinstance(self.average, bool):
            got = type(self.average).__name__
            raise TypeError(f"`cache`: 'average': expected true or false, got {got}")

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return H2OLayer(self.budget, self.recent, self.average)


class H2OLayer(EvictingLayer):
    """Keys and values of what has received most attention, and of the latest tokens.

    Attributes:
        mass: float32 [B Hk capacity], what each slot has received; None before the first tokens.
        given: the same, what the latest recorded step gave; ``advance`` adds it, so that a step
            which is launched twice, as the first one of a recording is, counts once.
        born: int64, the same, the column of the token in each slot; None where sums count.
    """

    is_continuous: ClassVar[bool] = True

    def __init__(self, budget: float, recent: float, average: bool = False) -> None:
        super().__init__(budget)
        self.recent, self.average = recent, average
        self.mass: Tensor | None = None
        self.born: Tensor | None = None
        self.given: Tensor | None = None

    def score(self, attended: Attended | None) -> Tensor:
        """Return what each slot has received."""
        assert self.mass is not None
        mass = self.mass[..., : self.held]
        return mass if self.born is None else mass / (self.columns - self.born[..., : self.held])

    def take(self, attended: Attended) -> None:
        """Add what the queries of a call give."""
        q, k = attended.q, attended.k
        given = attention_mass(
            q, k, attended.lse, scale=attended.scale, softcap=attended.softcap,
            leftpad_k=self.held_padding(),
        )  # fmt: skip
        given = given.unflatten(1, (k.shape[2], -1)).sum(2)  # [B Hk Tk]
        former = k.shape[1] - q.shape[1]
        if former:
            assert self.mass is not None
            given[..., :former] += self.mass[..., :former]
        fits = self._fits(given.shape[-1])
        self.mass = _put(given, self.mass if fits else None)
        if self.average:
            column = torch.arange(self.columns - q.shape[1], self.columns, device=given.device)
            born = column.expand(*given.shape[:2], -1)
            if former:
                assert self.born is not None
                born = torch.cat([self.born[..., :former], born], -1)
            self.born = _put(born, self.born if fits else None)

    def carry(self, slots: Tensor) -> None:
        """Keep what the slots have received that stay."""
        assert self.mass is not None
        stays = self.key_store is not None
        self.mass = _put(self.mass.gather(2, slots), self.mass if stays else None)
        if self.born is not None:
            self.born = _put(self.born.gather(2, slots), self.born if stays else None)

    def latest(self, limits: Tensor) -> Tensor:
        """Return how many of the latest tokens stay whatever they have received, [B]."""
        return (limits.double() * self.recent).ceil().long()

    def _fits(self, slots: int) -> bool:
        """Tell whether what is received lies in memory that goes with the store of the keys."""
        return (
            self.mass is not None
            and self.key_store is not None
            and slots <= self.mass.shape[-1] == self.key_store.shape[-2]
        )

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens, and for what they receive."""
        super().reserve(new)
        keys, _ = self.stores
        if self.mass is None or self.mass.shape[-1] != keys.shape[2]:
            B, Hk, capacity, _ = keys.shape
            held = 0 if self.mass is None else min(self.held, self.mass.shape[-1])
            larger = keys.new_zeros((B, Hk, capacity), dtype=torch.float32)
            self.mass = larger if self.mass is None else _put(self.mass[..., :held], larger)
            if self.born is not None:
                born = self.born.new_zeros((B, Hk, capacity))
                self.born = _put(self.born[..., :held], born)
        if self.given is None or self.given.shape != self.mass.shape:
            self.given = torch.zeros_like(self.mass)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, and what they gave to those before them."""
        super().advance(new)
        if not new:
            return
        assert self.mass is not None
        assert self.given is not None
        held = self.held
        self.mass[..., held - new : held] = 0
        self.mass[..., :held] += self.given[..., :held]
        if self.born is not None:
            column = torch.arange(self.columns - new, self.columns, device=self.born.device)
            self.born[..., held - new : held] = column

    def address(self) -> tuple[Tensor, ...]:
        """Return the stores, and what the slots have received."""
        assert self.given is not None
        return (*super().address(), self.given)

    def decode(
        self,
        q: Tensor,
        places: Tensor,
        *,
        mask: Mask,
        scale: float,
        sink_query: SinkQuery | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to what is held, and note what the query gives."""
        from bitnet_triton.kernels.attention_mass.decode import launch_decode_mass

        out, lse = super().decode(q, places, mask=mask, scale=scale, sink_query=sink_query)
        assert self.given is not None
        launch_decode_mass(
            q, self.stores[0].transpose(1, 2), lse, self.given, scale=scale,
            leftpad_k=places[LEFTPAD], seqused_k=places[USED],
        )  # fmt: skip
        return out, lse

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self.mass = self.given = self.born = None

    def rows_changed(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take other rows of what was received."""
        self.mass, self.given, self.born = (
            None if t is None else change(t) for t in (self.mass, self.given, self.born)
        )


def _put(value: Tensor, store: Tensor | None) -> Tensor:
    """Return a tensor that begins with ``value`` [B Hk slots]: the store, or none but itself."""
    if store is None:
        return value
    store[..., : value.shape[-1]] = value
    return store
