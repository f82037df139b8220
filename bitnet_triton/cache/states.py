"""A cache layer of constant size: a state that every token has changed, and no keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.key_values import may_write
from bitnet_triton.cache.memory import Call, Memory
from bitnet_triton.kernels import linear_attention

# rows of what a state layer tells a step
TURN, IS_TOKEN, POSITION = range(3)
# tokens of a call, up to which it can be taken back: as many as an assistant proposes
_MOST_TAKEN_BACK = 64


def latest(inputs: Tensor, R: int, T: int, used: Tensor | None) -> Tensor:
    """Return the last R of R + T inputs [B .. C] that are no padding, [B R C].

    Args:
        inputs: [B R + T C], or longer.
        R: how many stand before those of the call, and are wanted.
        T: of the call.
        used: int32 [B], of these before the padding on the right; None: all.
    """
    if used is None:
        return inputs[:, T : T + R].clone()  # the rest is not kept for its sake
    index = used.clamp_max(T)[:, None].long() + torch.arange(R, device=inputs.device)
    return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[2]))


@dataclass(frozen=True, eq=False)
class LastCall:
    """What the latest call has done to a state, so that a part of it can be done again.

    Attributes:
        k: [B T Hk D], as it was written.
        v: [B T Hk Dv].
        log_decay: [B T Hk] or [B T Hk D]; None: no decay.
        beta: [B T Hk]; None: plain sums.
        normalize: whether the state has a column of sums of keys.
        state: before the call; None: zeros.
        inputs: [B R + T C], those of a convolution that remembers R of them; None: there is none.
        used: int32 [B], tokens before the padding on the right; None: all.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    normalize: bool
    state: Tensor | None
    inputs: Tensor | None
    used: Tensor | None = None

    def but_for(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the state, and the inputs to remember, without the last n tokens."""
        T = self.k.shape[1] - n
        inputs = self.inputs
        if inputs is not None:
            inputs = latest(inputs, inputs.shape[1] - self.k.shape[1], T, self.used)
        if T == 0:
            return self.state, inputs
        k, v, log_decay, beta = (
            None if t is None else t[:, :T] for t in (self.k, self.v, self.log_decay, self.beta)
        )
        assert k is not None
        assert v is not None
        found = linear_attention(
            k, k, v, log_decay=log_decay, beta=beta, normalize=self.normalize,
            initial_state=self.state, return_state=True,
        )  # fmt: skip
        return found[1], inputs


class StateLayer(Memory):
    """The state of linear attention, and the latest inputs of a short convolution.

    It is as large after a million tokens as after one. Nothing can be cut out of a sum: what
    ``crop`` takes back has to lie in the latest call, if that had at most 64 tokens. To go back
    further, keep a ``copy.deepcopy`` of the cache: it is small.

    For recorded steps there are two of everything, in turn: a step reads the one and writes the
    other, so that it may run twice, and the token before can be taken back.

    Attributes:
        state: float32 [B Hk D Dv], or with a column for sums of keys; None: no token was seen.
        tail: [B R C], the latest inputs of the convolution; None: there is none.
        states: [2 ...], where ``state`` lies once a step was announced; None before.
        tails: likewise.
        last: the latest call, as long as it can be taken back.
    """

    is_savable: ClassVar[bool] = True
    state: Tensor | None
    tail: Tensor | None
    states: Tensor | None
    tails: Tensor | None
    last: LastCall | None
    _turn: int
    _is_step: bool

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    @property
    def kept_window(self) -> tuple[int, int]:
        """It has no keys."""
        return 0, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the tokens of keys and values [B Hk T D], and return these alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.tokens += key_states.shape[2]
        return key_states, value_states

    def keep(self, state: Tensor, tail: Tensor | None, last: LastCall) -> None:
        """Take in what a call has made of the state."""
        is_short = last.k.shape[1] <= _MOST_TAKEN_BACK and not state.requires_grad
        if self._fits(state, tail):
            assert self.states is not None
            other = 1 - self._turn
            self.states[other] = state
            if self.tails is not None and tail is not None:
                self.tails[other] = tail
            self._take(other)
        else:
            self._put(state, tail)
        self.last = last if is_short else None

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it has a state of B rows that a step may go on from."""
        state = self.state
        if state is None or state.requires_grad or (state.shape[0], state.device) != (B, device):
            return False
        return may_write(state)

    def reserve(self, new: int) -> None:
        """Put the state where steps find it."""
        if self.states is None and self.state is not None:
            self.states = torch.stack([self.state, self.state])
            self.tails = None if self.tail is None else torch.stack([self.tail, self.tail])
            self._take(0)

    def address(self) -> tuple[Tensor, ...]:
        """Return both states, and both inputs of the convolution."""
        return tuple(t for t in (self.states, self.tails) if t is not None)

    def places_key(self) -> int:
        """Return which of the two is read."""
        return self._turn

    def places(self, call: Call) -> Tensor:
        """Return int32 [3 B]: which is read, whether the token is no padding, its position."""
        assert self.state is not None
        places = torch.ones(3, self.state.shape[0], dtype=torch.int32)
        places[TURN] = self._turn
        if call.leftpad is not None:
            places[IS_TOKEN] = (call.columns >= call.leftpad).int()
        places[POSITION] = call.position
        return places

    def advance(self, new: int) -> None:
        """Count ``new`` tokens, which a step has taken into the other state."""
        super().advance(new)
        self._take(1 - self._turn)
        self.last, self._is_step = None, True

    def can_take_back(self, n: int) -> bool:
        """Tell whether the latest call had so many tokens, and is known."""
        if n == 0 or (n == 1 and self._is_step):
            return True
        return self.last is not None and n <= self.last.k.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says.

        Raises:
            RuntimeError: they do not lie in the latest call, or that was too long.
        """
        n = -tokens_to_remove
        if not self.can_take_back(n):
            raise RuntimeError(
                f"`tokens_to_remove`: a state takes back what lies in its latest call, if that has "
                f"at most {_MOST_TAKEN_BACK} tokens, got {n}; keep a copy of the cache to come "
                "back to"
            )
        if n and self._is_step:
            self._take(1 - self._turn)
        elif n:
            assert self.last is not None
            state, tail = self.last.but_for(n)
            self._put(state, tail)
        self.tokens -= n

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self._put(None, None)

    def _put(self, state: Tensor | None, tail: Tensor | None) -> None:
        """Hold these, wherever they lie."""
        self.state, self.tail = state, tail
        self.states = self.tails = self.last = None
        self._turn, self._is_step = 0, False

    def _take(self, turn: int) -> None:
        """Hold what lies in one of the two."""
        assert self.states is not None
        self._turn, self._is_step, self.last = turn, False, None
        self.state = self.states[turn]
        self.tail = None if self.tails is None else self.tails[turn]

    def _fits(self, state: Tensor, tail: Tensor | None) -> bool:
        if (
            self.states is None
            or self.states.shape[1:] != state.shape
            or not may_write(self.states)
        ):
            return False
        is_free = not (state.requires_grad or (tail is not None and tail.requires_grad))
        return is_free and (tail is None) == (self.tails is None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        self._change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        self._change_rows(lambda t: t[indices.to(t.device)])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._put(*(None if t is None else change(t) for t in (self.state, self.tail)))

    def saved(self) -> dict[str, Tensor]:
        """Return the state, the inputs of the convolution, and how many tokens there were."""
        found = {"state": self.state, "tail": self.tail, "tokens": torch.tensor(self.tokens)}
        return {name: t for name, t in found.items() if t is not None}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what ``saved`` has told."""
        self._put(saved["state"], saved.get("tail"))
        self.tokens, self.is_initialized = int(saved["tokens"]), True
