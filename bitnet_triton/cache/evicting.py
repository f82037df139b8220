"""A cache layer that drops tokens by scores: each head of keys and values keeps others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.cache.growing import GrowingLayer
from bitnet_triton.cache.key_values import LEFTPAD
from bitnet_triton.cache.memory import Attended, Call
from bitnet_triton.cache.named import check_whole
from bitnet_triton.kernels import Mask

# Where a step finds its memory full, one of so many rows goes, and room is made for as many steps
_PARTS = 32
_FEWEST = 16  # tokens that are added to the memory at least


def check_budget(budget: object) -> None:
    """Raise unless ``budget`` is a number of tokens, or a share of them above 0, at most 1."""
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"`cache`: 'budget': expected tokens, or a share above 0 and up to 1, got {budget}"
            )
    else:
        check_whole("budget", budget, 1)


class EvictingLayer(GrowingLayer):
    """Keys and values of the tokens with the best scores, which a subclass gives in ``score``.

    A call attends to all that is held and to its own tokens; then what is more than the budget
    goes. So a prompt that is read in chunks never takes more than the budget and a chunk. What is
    left of a head stands in the order of the text, with the angles that its positions have given
    it, as do the tokens to come. In a batch each row has a budget of its own; a row that keeps less
    than the longest one has empty slots in front.

    Where ``is_continuous``, generated tokens come out of the budget as well: a step that finds it
    used up drops one row of 32 at once. Otherwise only prompts are compressed, calls that bring a
    row more tokens than ``least`` that are not known to be generated, and generated tokens are
    added.

    Args:
        budget: rows of each head to keep: a number, or a share of the prompt's tokens.

    Attributes:
        columns: tokens seen so far, padding included.
        padding: int64 [B] on the CPU, how many of the slots that are held are empty; None: none.
    """

    is_savable: ClassVar[bool] = False  # files have no word for tokens that differ by head
    wants_prompt_len: ClassVar[bool] = True
    keeps_places: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = False
    first: int = 0  # so many tokens at the start of a text every head keeps

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.budget = budget
        self._forget()

    def _forget(self) -> None:
        self.columns = 0
        self.padding: Tensor | None = None
        self._left: Tensor | None = None  # padding of the text, int64 [B]
        self._prompt: int | Tensor | None = None
        self._limits: Tensor | None = None  # rows that each row of the batch may keep, int64 [B]
        self._dropped_at = 0  # columns at the latest eviction
        self._is_new = False

    # --- what a policy says

    def score(self, attended: Attended | None) -> Tensor:
        """Return how much the slots that are held are worth, float32 [B Hk held].

        Args:
            attended: the call that has just run; None: a step is about to come.
        """
        raise NotImplementedError

    def take(self, attended: Attended) -> None:
        """Take note of what a call has read, whether or not anything goes."""

    def carry(self, slots: Tensor) -> None:
        """Keep the slots [B Hk kept] of whatever else is kept for each of them."""

    def latest(self, limits: Tensor) -> Tensor:
        """Return how many of the latest tokens stay, whatever their scores, of ``limits`` [B]."""
        return torch.zeros_like(limits)

    def rows_changed(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take other rows of the batch, of whatever else is kept."""

    # --- events

    def begin(self, call: Call) -> None:
        """Note the padding of a text and the length of its prompt."""
        if call.leftpad is not None and self.columns == 0:
            self._left = call.leftpad.cpu().long()
        prompt = call.prompt_len
        self._prompt = prompt.cpu().long() if isinstance(prompt, Tensor) else prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B Hk T D]; return them behind all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if not self.columns:
            self._start_empty(key_states, value_states)
        elif new == 1:
            self._make_room()
        self._is_new = True
        held, limits = self.held, self._limits_with(new)
        is_traced = torch.is_grad_enabled() and key_states.requires_grad
        if is_traced or (new > 1 and held + new > int(limits.max())):
            # most of it goes as soon as attention has run: no store is made for it
            if held:
                assert self.keys is not None
                assert self.values is not None
                key_states = torch.cat([self.keys, key_states], dim=-2)
                value_states = torch.cat([self.values, value_states], dim=-2)
            self._count(new)
            self.key_store = self.value_store = None
            self._views = None, None
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        super().reserve(new)
        for store, t in zip(self.stores, (key_states, value_states)):
            store[:, :, held : held + new] = t
        self._count(new)
        super().advance(new)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @torch.no_grad()
    def after(self, attended: Attended) -> None:
        """Drop what is more than the budget; called again, it does nothing."""
        if not self._is_new:
            return
        self._is_new = False
        if not attended.is_whole:
            raise ValueError(
                "`attention_mask`: a cache that drops tokens by their scores takes padding to the "
                "left only"
            )
        self.take(attended)
        new = attended.q.shape[1]
        later = 0 if self.is_continuous else self._generated(new)
        if self.is_continuous or (not self._is_told and new - later > self.least):
            limits, valid = self._limits_with(0) + later, self._valid()
            if not self.is_continuous:  # a short row stays whole, as it would alone
                limits = torch.where(self._came(new) - later > self.least, limits, valid)
            if bool((valid > limits).any()):
                scores = F.pad(self.score(_without(attended, later)), (0, later), value=torch.inf)
                self._drop(scores, torch.minimum(valid, limits), later)
                return
        super().reserve(0)  # no view of what a call has computed is left

    def held_padding(self) -> Tensor | None:
        """Return int32 [B], how many slots of a row are empty; None: none, or nobody knows."""
        return None if self.padding is None else self.padding.int().to(self.device)

    # --- what a recorded step asks

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens; the stores stay where they are, once they have that."""
        if new == 1:
            self._make_room()
        super().reserve(new)

    def capacity(self, held: int, new: int) -> int:
        """Return how many slots a store gets."""
        plain = super().capacity(held, new)
        if self.is_continuous:
            return max(held + new, min(plain, int(self._limits_with(new).max())))
        return held + max(new, held // 8, _FEWEST) if self._dropped_at else plain

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, which somebody has written into the stores."""
        self._count(new)
        super().advance(new)

    def places_key(self) -> Hashable:
        """Return how many tokens are held and how many slots are empty."""
        return self.held, None if self.padding is None else tuple(self.padding.tolist())

    def places(self, call: Call) -> Tensor:
        """Return slot, position, padding and length of each row, int32 [4 B]."""
        places = super().places(call)
        places[LEFTPAD] = 0 if self.padding is None else self.padding
        return places

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say that slots do not tell which token they hold."""
        if mask != Mask() or sink_query:
            return "its cache drops tokens by their scores, and a mask goes by their places"
        return None

    # --- lengths

    def get_seq_length(self) -> int:
        """Return how many tokens were seen, kept or not."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``update`` gives at most, and how many columns it lacks."""
        return self.held + query_length, self.columns - self.held

    # --- changes

    def can_take_back(self, n: int) -> bool:
        """Only what has come after the latest eviction, and left no scores behind."""
        return not self.is_continuous and n <= self.columns - self._dropped_at

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says.

        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens were dropped since, or scores cannot be taken back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove`: expected at most 0, got {tokens_to_remove}")
        if not tokens_to_remove or not self.held:
            return
        if not self.can_take_back(-tokens_to_remove):
            raise RuntimeError(
                f"`tokens_to_remove`: a cache that drops tokens by their scores cannot take back "
                f"{-tokens_to_remove} of the latest ones: "
                + (
                    "what they have read counts for others"
                    if self.is_continuous
                    else f"it has dropped some {self.columns - self._dropped_at} tokens ago"
                )
            )
        assert self.keys is not None
        assert self.values is not None
        length = self.held + tokens_to_remove
        is_stored = self.keys is self._views[0]
        self.columns += tokens_to_remove
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        if is_stored:
            self._views = self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
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
        for name in ("padding", "_left", "_limits"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))
        self.rows_changed(change)

    # --- eviction

    def _valid(self) -> Tensor:
        """Return how many tokens each row holds, int64 [B]."""
        assert self.keys is not None
        held = torch.full((self.keys.shape[0],), self.held)
        return held if self.padding is None else held - self.padding

    def _came(self, new: int) -> Tensor:
        """Return how many of the latest ``new`` columns are no padding, int64 [B]."""
        if self._left is None:
            return torch.full((len(self._valid()),), new)
        return (self.columns - self._left).clamp(0, new)

    def _limits_with(self, new: int) -> Tensor:
        """Return how many rows each row of the batch may keep with ``new`` tokens, int64 [B]."""
        assert self.keys is not None
        B = self.keys.shape[0]
        if isinstance(self.budget, int):
            if self._limits is None:
                self._limits = torch.full((B,), self.budget)
        elif self._limits is None or not self._is_told:
            total = self.columns + new if self._prompt is None else self._prompt
            tokens = torch.as_tensor(total).expand(B)
            tokens = tokens if self._left is None else (tokens - self._left).clamp_min(0)
            self._limits = (tokens.double() * self.budget).ceil().long().clamp_min(1)
        return self._limits

    def _count(self, new: int) -> None:
        """Count tokens that have come, and what of them is padding."""
        if self._left is not None and new:
            padded = (self._left - self.columns).clamp(0, new)
            if self.padding is not None:
                padded = padded + self.padding
            self.padding = padded if bool(padded.any()) else None
        self.columns += new

    def _generated(self, new: int) -> int:
        """Return how many of the latest ``new`` tokens a row has written itself behind a prompt."""
        if self._prompt is None:
            return 0
        # where rows differ, tokens that some have written belong to the prompts of others
        return min(max(self.columns - int(torch.as_tensor(self._prompt).max()), 0), new)

    def _make_room(self) -> None:
        """Drop some rows where a step would find no room for its token."""
        if not self.is_continuous or not self.held:
            return
        limits, valid = self._limits_with(1), self._valid()
        is_full = valid >= limits
        if bool(is_full.any()):
            fewer = limits - (limits // _PARTS).clamp_min(1)
            self._drop(self.score(None), torch.where(is_full, fewer, valid))

    @torch.no_grad()
    def _drop(self, scores: Tensor, keep: Tensor, later: int = 0) -> None:
        """Keep the best ``keep`` [B] slots of every head, by scores [B Hk held].

        The ``later`` last ones have been written behind a prompt, and stay.
        """
        assert self.keys is not None
        assert self.values is not None
        width = int(keep.max())
        slots = self._best(scores, keep, width, later)  # [B Hk width]
        rows = slots[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        values = slots[..., None].expand(-1, -1, -1, self.values.shape[-1])
        kept = self.keys.gather(2, rows), self.values.gather(2, values)
        self.carry(slots)
        empty = width - keep
        self.padding = empty if bool(empty.any()) else None
        self._dropped_at = self.columns - later
        if self.keys is self._views[0] and self.key_store is not None:
            # a recorded step finds them where they were
            for store, t in zip(self.stores, kept):
                store[:, :, :width] = t
            self.keys, self.values = (store[:, :, :width] for store in self.stores)
            self._views = self.keys, self.values
        else:
            self.keys, self.values = kept

    def _best(self, scores: Tensor, keep: Tensor, width: int, later: int) -> Tensor:
        """Return the slots to keep in their order, int64 [B Hk width]; of equals the newer ones."""
        held, device = scores.shape[-1], scores.device
        slot = torch.arange(held, device=device)
        empty = torch.zeros_like(keep) if self.padding is None else self.padding
        first = keep.clamp_max(self.first)
        last = torch.minimum(self.latest(self._limits_with(0)) + later, keep - first)
        empty, first, last, keep = (t.to(device)[:, None, None] for t in (empty, first, last, keep))
        is_safe = (slot < empty + first) | (slot >= held - last)
        rank = scores.float().masked_fill(is_safe, float("inf"))
        rank = rank.masked_fill(slot < empty, float("-inf"))
        order = rank.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :width]
        chosen = held - 1 - order
        # a row that keeps less than the longest has empty slots in front, whatever stands there
        place = torch.arange(width, device=device)
        return chosen.masked_fill(place >= keep, -1).sort(-1).values.clamp_min(0)


def _without(attended: Attended, later: int) -> Attended:
    """Return a call without its ``later`` last tokens."""
    if not later:
        return attended
    rotary = attended.rotary
    if rotary is not None:
        rotary = rotary[0][:, :-later], rotary[1][:, :-later]
    q, k, lse = attended.q[:, :-later], attended.k[:, :-later], attended.lse[:, :, :-later]
    return replace(attended, q=q, k=k, lse=lse, rotary=rotary)
