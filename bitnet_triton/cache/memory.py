"""The protocol of a memory: what a layer keeps between calls, and how a recorded step finds it.

A memory is a cache layer of transformers. Whatever stands here has an answer that suits a memory
which no step is recorded on; one that has more to say overrides it, and nobody asks for its class.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from bitnet_triton.cache.transfers import Transfers
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention.operands import SinkQuery


@dataclass(frozen=True, eq=False)
class Call:
    """What the layers of a cache are told about a call of the model.

    Attributes:
        columns: tokens before the first one of the call, padding included; a static cache counts
            them in a tensor.
        leftpad: int32 [B], the first column that is no padding; None: the first one.
        position: of the first new token in the rotary embedding, a number or int [B].
        frequencies: [D / 2], angles of the rotary embedding for each position.
        prompt_len: columns of the prompt, a number or integers [B]; None: not known.
        rebase_to: position that the next token may start again from, because all layers agree;
            None: positions go on.
    """

    columns: int | Tensor
    leftpad: Tensor | None = None
    position: int | Tensor = 0
    frequencies: Tensor | None = None
    prompt_len: int | Tensor | None = None
    rebase_to: int | None = None

    @property
    def is_generated(self) -> bool:
        """Whether all tokens of the call are known to be generated ones."""
        if self.prompt_len is None or isinstance(self.columns, Tensor):
            return False
        longest = self.prompt_len
        if isinstance(longest, Tensor):
            longest = int(longest.max()) if longest.numel() else 0
        return self.columns >= longest


@dataclass(frozen=True, eq=False)
class Attended:
    """How attention has run over what a memory gave: causally, over all of it.

    Attributes:
        q: [B Tq H D], rotated.
        k: [B Tk Hk D], what ``update`` has returned.
        lse: float32 [B H Tq].
        scale: what scores were multiplied with.
        softcap: largest magnitude of a score; None: no bound.
        rotary: cosines and sines by which the queries were turned, each [B or 1, Tq, D]; None:
            nobody tells.
        is_whole: whether all tokens of the call are a row's own or padding in front of them.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    softcap: float | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    is_whole: bool = True


class Memory(CacheLayerMixin):
    """What one layer keeps between calls.

    A class that derives from a layer of transformers as well names that one first, whose answers
    then count.

    Attributes:
        tokens: how many it has seen, padding included.
        rebases: whether positions may start again, if those of all layers do.
        shift: int64 [B], how far rotary positions lag behind those of the text; None: not at all.
        is_savable: whether ``saved`` tells all that it keeps.
        wants_prompt_len: whether it goes by the length of the prompt; ``generate`` tells it.
        keeps_places: whether the slots of a row hold its first or latest tokens, without a gap, so
            that masks tell from a slot which token it is.
        is_plain: whether it holds the rotated keys and values of all tokens and nothing else, so
            that another memory of these may take its place.
        is_paged: whether it holds them in pages, which several texts may have in common.
        least: of a call of no more tokens nothing is dropped, where it drops tokens of a prompt.
        transfers: between its device and the model's, where what it keeps lies on another one.
    """

    is_savable: ClassVar[bool] = False
    wants_prompt_len: ClassVar[bool] = False
    keeps_places: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False
    is_paged: ClassVar[bool] = False
    least: int = 0
    tokens: int = 0
    rebases: bool = False
    transfers: Transfers | None = None
    shift: Tensor | None = None
    _is_told: bool = False  # that the prompt is over

    # --- what transformers asks of every cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn sizes, dtype and device from the first tokens."""
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return how many tokens were seen, kept or not."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next ``update`` gives, and how many columns it lacks."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return how many tokens are kept at most; -1: all."""
        return -1

    @property
    def kept_window(self) -> tuple[int, int] | None:
        """Of how many of the latest and of the first tokens of a text it has keys.

        Beside those of a call itself. None: of all, or of some that are chosen otherwise.
        """
        return None

    # --- events

    def join(self, layers: Sequence[object]) -> None:
        """Meet all layers of a cache, before the first token: some have something in common."""

    def begin(self, call: Call) -> None:
        """Take note that a call begins: of its padding, and of whether positions start again.

        A call may be told twice, where a step turns out not to be one that is recorded.
        """

    def after(self, attended: Attended) -> None:
        """Take note that attention has run, in a mode that is a mask.

        In a recorded step nobody calls it: there the memory's own ``decode`` has all of this. It
        may be called again for one ``update``, where somebody tries attention out.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attend in a mode that is a mask: over what ``update`` has given, and whatever is beside.

        Args:
            q: [B Tq H D], rotated.
            k: [B Tk Hk D], what ``update`` has returned.
            v: likewise.
            **settings: as ``flash_attention`` takes them, with ``return_lse``.
        """
        return cast("tuple[Tensor, Tensor]", flash_attention(q, k, v, **settings))

    def rows_beside(self) -> float:
        """Return how many tokens ``attend`` reads beside what ``update`` gives: a mean of rows."""
        return 0.0

    def held_padding(self) -> Tensor | None:
        """Return int32 [B], how many slots of what ``update`` has given hold no token.

        They come first in a row. None: as the padding of the call says.
        """
        return None

    def prompt_is_over(self) -> None:
        """Take note that the tokens to come are generated: build tables, compress, quantise."""

    # --- a second reading of a prompt, for a memory that ``wants_again``

    @property
    def wants_again(self) -> bool:
        """Whether the tokens of the call that has run have to be read again, behind themselves.

        The model then calls ``begin_again``, reads what ``read_again`` of its first such layer
        yields, which leaves no trace in the memory, and calls ``end_again``.
        """
        return False

    def read_again(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield what to read, in parts, of the tokens [B T] of the call that has run."""
        raise NotImplementedError

    def begin_again(self) -> None:
        """Take note that the second reading begins."""

    def end_again(self) -> None:
        """Take note that the second reading is over."""

    # --- what it holds

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that it keeps, for whoever counts memory; one may come twice.

        Found are its attributes, what stands in their lists, tuples and dicts, and the fields of
        dataclasses. A memory that keeps tensors anywhere else overrides this.
        """
        return tensors_in(vars(self))

    # --- what a recorded step asks

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it holds tokens of B rows in memory that a step can be recorded on."""
        return False

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens behind those that the layer holds."""

    def address(self) -> tuple[Tensor, ...]:
        """Return the tensors that a step reads and writes: the same ones, the recording fits."""
        return ()

    def places_key(self) -> Hashable:
        """Return what is equal for two layers whose ``places`` are."""
        return id(self)

    def places(self, call: Call) -> Tensor:
        """Return what changes from step to step, int32 [k B] on the CPU, with a k of its own.

        Args:
            call: of one new token a row, which is not counted yet.
        """
        raise NotImplementedError

    def last_position(self) -> int:
        """Return the largest rotary position that a step reads beside that of the new token."""
        return 0

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, which a step has written."""
        self.tokens += new

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate and store the new token, by launches alone; return its queries [B 1 H D].

        Args:
            heads: [B 1 H + 2 Hk D], queries, keys and values.
            cos: [P D], the rotary embedding of all positions.
            sin: likewise.
            places: int32 [k B] on the device.
        """
        raise NotImplementedError

    def decode(
        self,
        q: Tensor,
        places: Tensor,
        *,
        mask: Mask,
        scale: float,
        sink_query: SinkQuery | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to what ``mask`` shows of the held tokens, by launches alone.

        Args:
            q: [B 1 H D], rotated.
            places: int32 [k B] on the device.
            mask: which tokens are seen.
            scale: multiplies the scores.
            sink_query: what the sinks of the mask meet once they have left its window; None: ``q``.

        Returns:
            out [B 1 H D] and lse [B H 1].
        """
        raise NotImplementedError

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say why ``decode`` cannot follow ``mask``; None when it can.

        Args:
            mask: which tokens are seen.
            sink_query: whether ``decode`` gets its argument of that name.
        """
        return "its cache has no recorded step"

    # --- files

    def saved(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs to make an ``is_savable`` memory again, by name."""
        raise NotImplementedError

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what ``saved`` has told; the memory is empty."""
        raise NotImplementedError

    # --- taking back

    def can_take_back(self, n: int) -> bool:
        """Tell whether ``crop(-n)`` makes the memory what it was ``n`` tokens before."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says.

        Raises:
            RuntimeError: they cannot be taken back.
        """
        if tokens_to_remove and not self.can_take_back(-tokens_to_remove):
            raise RuntimeError(
                f"`tokens_to_remove`: {type(self).__name__} cannot take back what it has taken in"
            )
        self.tokens += tokens_to_remove


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples, dicts and dataclasses, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, (dict, list, tuple, set)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def begin_call(layers: Sequence[object], call: Call) -> Tensor | None:
    """Tell the layers of a cache that a call begins.

    Args:
        layers: those of this package are told; of others, nobody knows what they would do.
        call: without ``rebase_to``.

    Returns:
        int64 [B], how far rotary positions lag behind those of the text; None: not at all.
    """
    memories = [layer for layer in layers if isinstance(layer, Memory)]
    if not memories:
        return None
    # positions are the same in all layers: they start again in all of them or in none
    if len(memories) == len(layers) and all(memory.rebases for memory in memories):
        most = max(memory.get_max_length() for memory in memories)
        call = replace(call, rebase_to=most + 1)
    is_generated = call.is_generated
    for memory in memories:
        if is_generated and not memory._is_told:
            memory.prompt_is_over()
        memory._is_told = is_generated
        memory.begin(call)
    return memories[0].shift if call.rebase_to is not None else None
