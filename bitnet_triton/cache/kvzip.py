"""A prompt compressed by what repeating it takes (KVzip, arXiv:2505.23416).

Once a prompt has been read, the model reads it again behind itself. A token is worth the most that
any query of the second reading, of any head that shares its key, has given to it. No question is
needed for that: what helps to write the text again helps to answer about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.cache.evicting import EvictingLayer, check_budget
from bitnet_triton.cache.memory import Attended, Call, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole

_QUERIES = 256  # of which the probabilities are there at a time
_OVERLAP = 8  # tokens of the part before, which tell where the next part goes on


@dataclass(frozen=True)
class KVzip(MemoryKind):
    """What the model looks at when it reads a prompt again; the first tokens stay.

    A prompt takes another reading for that, behind itself: longer than the first one, since its
    queries see the prompt and what was read again.

    Attributes:
        budget: rows that each head keeps of a prompt, a number, or a share of its tokens.
        part: tokens that are read again at a time, each time behind the whole prompt.
        ask: tokens of the model in front of each part, as "Repeat the text above" in its words.
        sinks: first tokens, which stay.
        least: a call of no more tokens is not compressed.
    """

    evicts: ClassVar[bool] = True

    budget: float = 0.2
    part: int = 2048
    ask: tuple[int, ...] = ()
    sinks: int = 4
    least: int = 64

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_whole("part", self.part, 2)
        check_whole("sinks", self.sinks, 0)
        check_whole("least", self.least, 1)
        if not isinstance(self.ask, (list, tuple)):
            got = type(self.ask).__name__
            raise TypeError(f"`cache`: 'ask': expected a list of token ids, got {got}")
        for token in self.ask:
            check_whole("ask", token, 0)
        object.__setattr__(self, "ask", tuple(self.ask))

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return KVzipLayer(self)


class KVzipLayer(EvictingLayer):
    """Keys and values of a prompt, as many as the budget says, and of what was generated.

    Attributes:
        worth: float32 [B Hk slots], the most that each slot was given while its text was read
            again; None: nothing was compressed yet.
    """

    def __init__(self, kind: KVzip) -> None:
        super().__init__(kind.budget)
        self.kind, self.least, self.first = kind, kind.least, kind.sinks
        self.worth: Tensor | None = None
        self._later: int | None = None  # of a call that waits for its second reading
        self._rereads = False

    # --- the second reading

    @property
    def wants_again(self) -> bool:
        """Whether the tokens of the call that has run have to be read again."""
        return self._later is not None and not self._rereads

    def read_again(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield what to read, in parts, of the tokens [B T] of the call that has run."""
        ask = tokens.new_tensor(self.kind.ask).expand(tokens.shape[0], -1)
        T, size = tokens.shape[1], self.kind.part
        for start in range(0, T, size):
            yield torch.cat([ask, tokens[:, max(0, start - _OVERLAP) : start + size]], dim=1)

    def begin_again(self) -> None:
        """Note from now on what queries give, and keep nothing of their tokens."""
        assert self.keys is not None
        B, Hk, held, _ = self.keys.shape
        worth = self.keys.new_zeros((B, Hk, held), dtype=torch.float32)
        if self.worth is not None:
            worth[..., : self.worth.shape[-1]] = self.worth
        self.worth, self._rereads = worth, True

    @torch.no_grad()
    def end_again(self) -> None:
        """Drop what is more than the budget."""
        assert self.worth is not None
        assert self._later is not None
        later, self._later, self._rereads = self._later, None, False
        scores = self.worth.clone()
        scores[..., self.held - later :] = torch.inf
        limits = self._limits_with(0) + later
        self._drop(scores, torch.minimum(self._valid(), limits), later)
        self.worth = self.worth[..., : self.held - later]  # others may take the place of the rest

    def shrink(self, budget: int) -> None:
        """Keep fewer rows of a prompt than were kept: the same as if ``budget`` had been told.

        Args:
            budget: rows of each head; of what was generated since, all stay.

        Raises:
            ValueError: no prompt was compressed, or fewer rows are held already.
        """
        kept = 0 if self.worth is None else self.worth.shape[-1]
        if not 0 < budget <= kept:
            raise ValueError(f"`budget`: expected 1 to {kept} rows, got {budget}")
        assert self.worth is not None
        later = self.held - kept
        self.budget, self._limits = budget, None
        self.worth = scores = F.pad(self.worth, (0, later), value=torch.inf)
        self.key_store = self.value_store = None  # a smaller one will do
        self._views = None, None
        self._drop(scores, torch.full((len(scores),), budget + later), later)
        self.worth = self.worth[..., :budget]

    # --- events

    def begin(self, call: Call) -> None:
        """Note the length of the prompt.

        Raises:
            ValueError: there is padding, or nobody has read the last prompt again.
        """
        if self._rereads:
            return
        if self.wants_again:
            raise ValueError(
                "`cache`: 'kvzip' needs a model that reads its prompt again, a BitNetForCausalLM "
                "with `config.attention`"
            )
        if call.leftpad is not None and bool((call.leftpad > 0).any()):
            raise ValueError(
                "`attention_mask`: 'kvzip' reads a prompt again as it is, without padding"
            )
        super().begin(call)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B Hk T D], unless they are read again; return them behind what is held."""
        if not self._rereads:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    @torch.no_grad()
    def after(self, attended: Attended) -> None:
        """Note what a second reading gives; tell that a prompt wants one."""
        if self._rereads:
            self._note(attended)
            return
        if not self._is_new:
            return
        new = attended.q.shape[1]
        later = self._generated(new)
        limits = self._limits_with(0) + later
        is_short = self._is_told or new - later <= self.least
        if not attended.is_whole or is_short or bool((self._valid() <= limits).all()):
            super().after(attended)
            return
        self._is_new, self._later = False, later
        assert self.keys is not None
        assert self.values is not None
        # no view of what the call has computed is left, and no store is made of what goes soon
        self.keys, self.values = self.keys.clone(), self.values.clone()

    def _note(self, attended: Attended) -> None:
        """Take the most that queries give to each slot, over the heads that share its key."""
        assert self.worth is not None
        q, k, lse = attended.q.float(), attended.k[:, : self.held].float(), attended.lse
        Hk = k.shape[2]
        for start in range(0, q.shape[1], _QUERIES):
            part = slice(start, start + _QUERIES)
            heads = q[:, part].unflatten(2, (Hk, -1)) * attended.scale  # [B Q Hk G D]
            scores = torch.einsum("bqhgd,bthd->bhgqt", heads, k)
            if attended.softcap is not None:
                scores = attended.softcap * torch.tanh(scores / attended.softcap)
            scores -= lse[:, :, part].unflatten(1, (Hk, -1))[..., None]
            self.worth = torch.maximum(self.worth, scores.amax((2, 3)).exp())

    def carry(self, slots: Tensor) -> None:
        """Keep the worth of the slots that stay."""
        assert self.worth is not None
        self.worth = self.worth.gather(2, slots)

    # --- changes

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self.worth, self._later, self._rereads = None, None, False

    def rows_changed(self, change: Callable[[Tensor], Tensor]) -> None:
        """Take other rows of what slots are worth."""
        self.worth = None if self.worth is None else change(self.worth)
