"""Keys and values as codes of 8 or 4 bits; the first tokens and the latest ones as they are.

What leaves the window of the latest tokens is rotated by a Hadamard matrix, which spreads outliers,
and kept as codes, of which the attention kernel reads no more than them. A call reads its own
tokens and the window before them in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitnet_triton.cache.key_values import may_write
from bitnet_triton.cache.memory import Attended, Call, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole
from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels import KeyValueCodes, Mask, flash_attention, quantised_attention
from bitnet_triton.kernels.flash_attention.operands import SinkQuery
from bitnet_triton.kernels.quantised_attention.codes import GROUP
from bitnet_triton.kernels.rotary.op import ROTARY_AND_STORE
from bitnet_triton.runtime import select

# The rows of ``places``
_SLOT, _POSITION, _RECENT, _CODED = range(4)

_FEWEST = 4  # groups that are added to the codes at least
_CAUSAL = Mask()


@dataclass(frozen=True)
class Quantised(MemoryKind):
    """Codes of keys and values.

    Attributes:
        bits: of a code, 4 or 8.
        recent: latest tokens that stay as they are, a multiple of 64.
        sinks: first tokens of a text that stay as they are.
        rotate: rotate heads by a Hadamard matrix first; False is for comparison.
    """

    # codes come before what stays as it is: only a mode that looks at no key's place goes with them
    evicts: ClassVar[bool] = True

    bits: int = 4
    recent: int = 128
    sinks: int = 4
    rotate: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"`cache`: 'bits': expected 4 or 8, got {self.bits!r}")
        check_whole("recent", self.recent, GROUP)
        if self.recent % GROUP:
            raise ValueError(
                f"`cache`: 'recent': expected a multiple of {GROUP}, got {self.recent}"
            )
        check_whole("sinks", self.sinks, 0)
        if not isinstance(self.rotate, bool):
            raise TypeError(
                f"`cache`: 'rotate': expected true or false, got {type(self.rotate).__name__}"
            )

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return QuantisedLayer(self.bits, self.recent, self.sinks, self.rotate)


class QuantisedLayer(Memory):
    """The first ``sinks`` tokens and the latest ``recent`` ones as they are, codes of all others.

    ``near`` holds the former: [B Hk sinks + recent D], the latest in a ring. Token number p of a
    row, which padding does not count, lies at p where p < sinks, else at
    ``sinks + (p - sinks) % recent``, and has code number p - sinks once it has left the ring. Codes
    are made of whole groups, when the first token of one has to leave.

    ``places`` are int32 [4 B], of each row: the slot of the new token, its position, how many slots
    of the ring are in use with it, and how many codes.
    """

    is_savable: ClassVar[bool] = True
    keeps_places: ClassVar[bool] = False

    def __init__(self, bits: int, recent: int, sinks: int, rotate: bool = True) -> None:
        super().__init__()
        self.bits, self.recent, self.sinks, self.rotate = bits, recent, sinks, rotate
        self.tokens = 0
        self.near: tuple[Tensor, Tensor] | None = None
        self.codes: KeyValueCodes | None = None
        self._left: list[int] = []  # padding in front of each row
        self._padding: Tensor | None = None  # empty slots of what update has given
        self._coded: Tensor | None = None  # int32 [B], codes that the call may read
        self._leftpad: Tensor | None = None

    # --- counts, of each row

    def _counts(self) -> list[int]:
        return [max(self.tokens - left, 0) for left in self._left]

    def _num_codes(self, count: int) -> int:
        """Return how many of ``count`` tokens have left the ring."""
        return max(count - self.sinks - self.recent, 0)

    def _slot(self, p: int) -> int:
        return p if p < self.sinks else self.sinks + (p - self.sinks) % self.recent

    # --- events

    def begin(self, call: Call) -> None:
        """Note the padding of a call."""
        self._leftpad = call.leftpad
        if self._left:
            self._left = self._padding_of(len(self._left))

    def _padding_of(self, B: int) -> list[int]:
        return [0] * B if self._leftpad is None else self._leftpad.tolist()

    def after(self, attended: Attended) -> None:
        """Refuse padding behind tokens: it would be taken in like a text."""
        if not attended.is_whole:
            raise ValueError("`attention_mask`: a cache of codes takes padding to the left of rows")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn sizes, dtype and device from the first tokens."""
        B, Hk, _, D = key_states.shape
        if value_states.shape[-1] != D:
            raise ValueError("`cache`: codes are for keys and values of one size")
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (B, Hk, self.sinks + self.recent, D)
        # what is not yet written has to be finite: it is multiplied with a weight of 0
        self.near = tuple(key_states.new_zeros(shape) for _ in range(2))  # type: ignore[assignment]
        self.codes = KeyValueCodes.empty(B, Hk, _FEWEST, D, self.bits, self.device, self.rotate)
        self._left = self._padding_of(B)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in tokens [B Hk T D]; return them behind all that was held as it is.

        What is returned ends with the new tokens; in front are ``held_padding`` empty slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.near is not None
        before, new = self._counts(), key_states.shape[-2]
        held = [min(count, self.sinks + self.recent) for count in before]
        coded = [self._num_codes(count) for count in before]
        self.tokens += new
        after = self._counts()
        given = key_states, value_states
        if any(held):
            past = [self._in_order(t, before, max(held)) for t in self.near]
            given = tuple(torch.cat([p, t], dim=-2) for p, t in zip(past, given))  # type: ignore[assignment]
        length = given[0].shape[-2]
        empty = [length - h - (b - a) for h, a, b in zip(held, before, after)]
        device = key_states.device
        self._padding = (
            torch.tensor(empty, dtype=torch.int32, device=device) if any(empty) else None
        )
        self._coded = torch.tensor(coded, dtype=torch.int32, device=device) if any(coded) else None
        with torch.no_grad():
            self._take_in(given, before, after)
        return given

    def _in_order(self, t: Tensor, counts: list[int], most: int) -> Tensor:
        """Return what the ring holds, oldest first, at the end of [B Hk most D]."""
        rows = []
        for count in counts:
            first = max(count - self.recent, self.sinks)
            held = [*range(min(count, self.sinks)), *range(first, count)]
            slots = [self._slot(p) for p in held]
            rows.append([0] * (most - len(slots)) + slots)
        index = torch.tensor(rows, device=t.device)[:, None, :, None]
        return t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3]))

    def _take_in(self, given: tuple[Tensor, Tensor], before: list[int], after: list[int]) -> None:
        """Make codes of what leaves the ring, and keep in it what comes."""
        assert self.near is not None
        if not may_write(self.near[0]):
            self._copy()
        length = given[0].shape[-2]
        for row, (old, count) in enumerate(zip(before, after)):
            first = self._groups_of(old)
            last = self._groups_of(count)
            if last > first:
                # where token ``sinks + first * GROUP`` stands in what is given
                start = length - (count - self.sinks - first * GROUP)
                part = slice(start, start + (last - first) * GROUP)
                self._make_room(last)
                assert self.codes is not None
                self.codes.write(row, first, *(t[row, :, part] for t in given))
            kept = [p for p in range(old, count) if p < self.sinks or p >= count - self.recent]
            if kept:
                slots = torch.tensor([self._slot(p) for p in kept], device=given[0].device)
                places = torch.tensor([length - count + p for p in kept], device=given[0].device)
                for store, t in zip(self.near, given):
                    store[row, :, slots] = t[row, :, places].detach().to(store.dtype)

    def _groups_of(self, count: int) -> int:
        """Return how many groups have codes where a row has ``count`` tokens."""
        return -(-self._num_codes(count) // GROUP)

    def _make_room(self, groups: int) -> None:
        assert self.codes is not None
        held = self.codes.capacity // GROUP
        if groups > held:
            self.codes = self.codes.larger(max(groups, held + max(held // 4, _FEWEST)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attend to what ``update`` has given, and to the codes before it."""
        out, lse = flash_attention(q, k, v, **settings)
        if self._coded is None:
            return out, lse
        if settings.get("s_aux") is not None:
            raise ValueError("`s_aux`: a cache of codes goes without learnable sinks")
        assert self.codes is not None
        return quantised_attention(
            q, self.codes, self._coded, scale=settings["scale"], softcap=settings.get("softcap"),
            more=(out, lse),
        )  # fmt: skip

    def rows_beside(self) -> float:
        """Return how many tokens the call reads as codes: a mean of rows."""
        return 0.0 if self._coded is None else self._coded.float().mean().item()

    def held_padding(self) -> Tensor | None:
        """Return int32 [B], how many slots of what ``update`` has given are empty; None: none."""
        return self._padding

    # --- what transformers asks

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``update`` gives, and how many columns it lacks."""
        held = min(max(self._counts(), default=0), self.sinks + self.recent)
        return held + query_length, self.tokens - held

    def get_seq_length(self) -> int:
        """Return how many tokens were seen."""
        return self.tokens

    # --- recorded steps

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it holds tokens of B rows, in that dtype, on that device."""
        if self.near is None or not self.tokens:
            return False
        keys = self.near[0]
        return keys.shape[0] == B and keys.dtype == dtype and keys.device == device

    def reserve(self, new: int) -> None:
        """Make codes of what the next token pushes out of the ring."""
        assert new == 1
        assert self.near is not None
        if not may_write(self.near[0]):
            self._copy()
        if self.rotate:
            # Triton is imported on first use
            from bitnet_triton.kernels.hadamard.forward import rotation

            # nothing was coded yet behind a short prompt, and a recording computes no matrix
            rotation(self.near[0].shape[-1], self.near[0].device)
        for row, count in enumerate(self._counts()):
            group = self._groups_of(count)
            if self._groups_of(count + 1) > group:
                self._make_room(group + 1)
                start = self._slot(self.sinks + group * GROUP)
                assert self.codes is not None
                part = slice(start, start + GROUP)
                self.codes.write(row, group, *(t[row, :, part] for t in self.near))

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores."""
        assert self.near is not None
        assert self.codes is not None
        return (*self.near, *self.codes.tensors().values())

    def places_key(self) -> Hashable:
        """Return what decides about places."""
        return self.tokens, self.sinks, self.recent, tuple(self._left)

    def places(self, call: Call) -> Tensor:
        """Return slot, position, slots in use and codes in use of each row, int32 [4 B]."""
        counts = self._counts()
        places = torch.empty((4, len(counts)), dtype=torch.int32)
        places[_SLOT] = torch.tensor([self._slot(count) for count in counts])
        places[_POSITION] = call.position
        near = [min(count + 1, self.sinks + self.recent) for count in counts]
        places[_RECENT] = torch.tensor(near)
        places[_CODED] = torch.tensor([self._num_codes(count + 1) for count in counts])
        return places

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate queries and keys, store keys and values in the ring; return the queries."""
        assert self.near is not None
        keys, values = (store.transpose(1, 2) for store in self.near)  # the layout of ops
        run = select("rotary_and_store", ROTARY_AND_STORE, keys.device)
        return run(heads, cos, sin, keys, values, places[_SLOT], places[_POSITION])

    def decode(
        self,
        q: Tensor,
        places: Tensor,
        *,
        mask: Mask,
        scale: float,
        sink_query: SinkQuery | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the ring and to the codes."""
        # Triton is imported on first use
        from bitnet_triton.kernels.flash_attention.decode import launch_decode
        from bitnet_triton.kernels.quantised_attention.forward import launch_quantised_attention

        assert self.near is not None
        assert self.codes is not None
        keys, values = (store.transpose(1, 2) for store in self.near)
        near = launch_decode(q, keys, values, mask=_CAUSAL, scale=scale, seqused_k=places[_RECENT])
        return launch_quantised_attention(q, self.codes, places[_CODED], scale=scale, more=near)

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say that codes are read as a whole."""
        if sink_query or mask != _CAUSAL:
            return "its cache keeps codes, which are read as a whole"
        return None

    # --- files

    def saved(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs to make the layer again."""
        assert self.near is not None
        assert self.codes is not None
        about = [self.tokens, self.bits, self.recent, self.sinks, int(self.rotate)]
        codes = {f"codes.{name}": t for name, t in self.codes.tensors().items()}
        return {
            "keys": self.near[0], "values": self.near[1], "about": torch.tensor(about),
            "leftpad": torch.tensor(self._left), **codes,
        }  # fmt: skip

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what ``saved`` has told; the layer is empty."""
        tokens, *about = saved["about"].tolist()
        mine = [self.bits, self.recent, self.sinks, int(self.rotate)]
        if about != mine:
            raise CheckpointError(
                f"`cache`: expected codes with bits, recent, sinks and rotate {mine}, got {about}"
            )
        self.lazy_initialization(saved["keys"], saved["values"])
        self.near = saved["keys"], saved["values"]
        assert self.codes is not None
        names = self.codes.tensors()
        made: dict[str, Any] = {name: saved[f"codes.{name}"] for name in names}
        for name in ("keys", "values"):
            expected, found = list(names[name].shape), list(made[name].shape)
            if found[:2] + found[3:] != expected[:2] + expected[3:]:
                raise CheckpointError(
                    f"`cache`: codes of {name} lie in another way: expected [B Hk groups, "
                    f"{', '.join(map(str, expected[3:]))}], got {found}"
                )
        self.codes = KeyValueCodes(**{"key_zero": None, **made}, is_rotated=self.rotate)
        self.tokens, self._left = tokens, saved["leftpad"].tolist()

    # --- changes

    def can_take_back(self, n: int) -> bool:
        """Tell whether nothing has left the ring: what codes stand for is not what there was."""
        return not any(self._num_codes(count) for count in self._counts())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says, or none for 0.

        Tokens that come into the window again are what their codes stand for.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove`: expected at most 0, got {tokens_to_remove}")
        if not self.is_initialized or not tokens_to_remove:
            return
        before = self._counts()
        self.tokens = max(self.tokens + tokens_to_remove, 0)
        assert self.near is not None
        assert self.codes is not None
        if not may_write(self.near[0]):
            self._copy()
        for row, (old, count) in enumerate(zip(before, self._counts())):
            first = max(count - self.recent, self.sinks)
            end = min(max(old - self.recent, self.sinks), count)
            if end > first:
                slots = [self._slot(p) for p in range(first, end)]
                found = self.codes.read(row, first - self.sinks, end - self.sinks)
                for store, t in zip(self.near, found):
                    store[row, :, slots] = t.to(store.dtype)

    def reset(self) -> None:
        """Forget everything."""
        self.near = self.codes = self._padding = self._coded = self._leftpad = None
        self._left, self.tokens, self.is_initialized = [], 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        self._change_rows(lambda t: t.index_select(0, indices.to(t.device)))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.near is None or self.codes is None:
            return
        self.near = tuple(change(t) for t in self.near)  # type: ignore[assignment]
        self.codes = self.codes.changed(change)
        self._left = change(torch.tensor(self._left)).tolist()

    def _copy(self) -> None:
        """Find memory of our own, where inference mode has made what is held."""
        self._change_rows(torch.clone)
