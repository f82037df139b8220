"""A memory in pages: attention reads them where they lie, and rows that are alike share them.

Padding takes no place: token number p of a row is the p-th that is none. All layers of a cache have
one table, so what changes it is done by the first layer that is asked, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from bitnet_triton.cache.memory import Attended, Call, Memory
from bitnet_triton.cache.named import MemoryKind, check_whole
from bitnet_triton.cache.pages.pool import PagePool
from bitnet_triton.cache.pages.tables import Tables
from bitnet_triton.kernels import Mask, flash_attention, write_pages
from bitnet_triton.kernels.flash_attention.operands import SinkQuery
from bitnet_triton.kernels.flash_attention.paged_call import PagedCall
from bitnet_triton.kernels.rotary.op import ROTARY_AND_STORE
from bitnet_triton.runtime import select

# The rows of ``places``; behind them the tables of all rows, one after the other
_SLOT, _POSITION, _USED, _TABLES = range(4)

_CAUSAL = Mask()
_SMALLEST = 16  # tokens of a page: a tile of keys lies in one, and GPUs multiply no smaller ones


@dataclass(frozen=True)
class Pages(MemoryKind):
    """Keys and values in pages, which rows of a batch that come from one another share.

    Attributes:
        page_size: tokens of a page, a power of two, at least 16.
        tokens: how many there is room for, in all rows together; None: as many as come.
    """

    # what a call gets is not all there is: only a mode that looks at no key's place goes with it
    evicts: ClassVar[bool] = True

    page_size: int = 16
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_whole("page_size", self.page_size, _SMALLEST)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"`cache`: 'page_size': expected a power of two, got {self.page_size}")
        if self.tokens is not None:
            check_whole("tokens", self.tokens, self.page_size)

    def pool(self) -> PagePool:
        """Return an empty pool."""
        most = None if self.tokens is None else self.tokens // self.page_size
        return PagePool(self.page_size, most)

    def memory(self) -> Memory:
        """Return an empty memory of one layer."""
        return PagedLayer(Batch(self.pool()), 0)


class Batch:
    """What the layers of a cache have in common: which tokens there are, and in which pages.

    Attributes:
        pool: where pages come from.
        tables: of the rows; None before the first tokens.
        layers: how many there are.
        columns: tokens of all rows, padding included.
        origin: int64 [B], of each row the one that it was when the batch was made; None: itself.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.layers = pool, 1
        self.tables: Tables | None = None
        self.columns = 0
        self.origin: np.ndarray | None = None
        self.left = np.zeros(0, dtype=np.int64)  # padding in front of each row
        self._call: Call | None = None
        self._given: Tensor | None = None  # padding as the call says
        self._events, self._last = 0, ""
        # of the last call: [B T] where its tokens go, int32 [B N] and [B] what it reads
        self.slots: Tensor | None = None
        self.table: Tensor | None = None
        self.used: Tensor | None = None
        self.is_first = False  # no row held a token before
        self.is_unread = False  # nobody has read pages for the layer that was updated last

    def follow(self, seen: int, event: str, act: Callable[[], None]) -> int:
        """Do what all layers are asked to do when the first of them is asked.

        Args:
            seen: how many events the layer has seen.
            event: what it is asked for.
            act: does it.

        Returns:
            How many the layer has seen now.

        Raises:
            RuntimeError: another layer was asked for something else: a call has failed midway.
        """
        if seen == self._events:
            act()
            self._events, self._last = seen + 1, event
        elif seen != self._events - 1 or event != self._last:
            raise RuntimeError(
                "`past_key_values`: a call has failed midway, and its layers hold different "
                "tokens; start with an empty cache"
            )
        return seen + 1

    def begin(self, call: Call) -> None:
        """Note the padding of a call, of which every layer tells."""
        if call is not self._call:
            self._call, self._given = call, call.leftpad
            if self.tables is not None:
                self._read_padding(self.tables.rows)

    def start(self, B: int, like: Tensor) -> None:
        """Find memory for B rows of heads like those of ``like``."""
        self.pool.prepare(self.layers, like)
        if self.tables is None:
            self.tables = Tables(self.pool, B)
            self._read_padding(B)

    def _read_padding(self, B: int) -> None:
        left = np.zeros(B, dtype=np.int64)
        if self._given is not None:
            left[:] = self._given.cpu().numpy()
        self.left = left

    def counts(self, columns: int) -> np.ndarray:
        """Return how many tokens each row has in so many columns, int64 [B]."""
        return np.maximum(columns - self.left, 0)

    def reserve(self, T: int) -> np.ndarray:
        """Make room for T columns; return int64 [B], how many tokens of each row are in them."""
        assert self.tables is not None
        before, after = self.counts(self.columns), self.counts(self.columns + T)
        if (before != self.tables.lengths).any():
            row = int(np.flatnonzero(before != self.tables.lengths)[0])
            raise ValueError(
                f"`attention_mask`: row {row} has {before[row]} tokens before this call by the "
                f"mask, the cache holds {self.tables.lengths[row]}"
            )
        new = after - before
        self.tables.reserve(new)
        return new

    def write(self, B: int, T: int, device: torch.device) -> None:
        """Say where T new columns of B rows go, and count them."""
        assert self.tables is not None
        if self.tables.rows != B:
            raise ValueError(
                f"`past_key_values`: expected {self.tables.rows} rows, as it holds, got {B}"
            )
        self.is_first = not self.tables.lengths.any()
        new = self.reserve(T)
        self.slots = self.tables.slots(new, T).to(device)
        self.advance(T)
        self.table = torch.from_numpy(self.tables.table.copy()).to(device)
        self.used = torch.from_numpy(self.tables.lengths.astype(np.int32)).to(device)

    def advance(self, T: int) -> None:
        """Count T columns, which somebody writes."""
        assert self.tables is not None
        self.tables.advance(self.counts(self.columns + T) - self.counts(self.columns))
        self.columns += T

    def crop(self, n: int) -> None:
        """Forget the last n columns."""
        self.columns -= n
        if self.tables is not None:
            self.tables.crop(self.counts(self.columns))

    def select(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change rows as ``change`` changes a tensor of them: of references, nothing is copied."""
        if self.tables is not None:
            rows = change(torch.arange(self.tables.rows)).numpy()
            if self.origin is not None:
                self.origin = self.origin[rows]
            elif not np.array_equal(rows, np.arange(self.tables.rows)):
                self.origin = rows
            self.tables.select(change)
            self.left = change(torch.from_numpy(self.left)).numpy()
            self._call = self._given = None  # of other rows

    def clear(self) -> None:
        """Forget everything."""
        if self.tables is not None:
            self.tables.clear()
        self.tables, self.columns, self._call, self._given = None, 0, None, None
        self.is_unread = False


class PagedLayer(Memory):
    """Keys and values of one layer in the pages of a batch.

    ``update`` writes the tokens of a call and gives them back; ``attend`` reads the pages, where
    there was a token before. ``places`` are int32 [3 + N B]: of each row the slot of the new token,
    its position, how many tokens it has with it; then N pages of each row, one row behind another.

    Args:
        batch: that of all layers of the cache.
        index: which of them this one is.
    """

    is_croppable = True
    is_paged: ClassVar[bool] = True
    keeps_places: ClassVar[bool] = False

    def __init__(self, batch: Batch, index: int) -> None:
        super().__init__()
        self.batch, self.index = batch, index
        self.tokens = batch.columns
        self._seen = batch._events

    def join(self, layers: Sequence[object]) -> None:
        """Share tables and pool with the other layers of a cache, before the first token."""
        paged = [layer for layer in layers if isinstance(layer, PagedLayer)]
        self.batch, self.index = paged[0].batch, paged.index(self)
        self.batch.layers = len(paged)

    # --- events

    def begin(self, call: Call) -> None:
        """Note the padding of a call."""
        self.batch.begin(call)

    def after(self, attended: Attended) -> None:
        """Refuse padding behind tokens: it would be taken in like a text."""
        if not attended.is_whole:
            raise ValueError("`attention_mask`: a cache of pages takes padding to the left of rows")

    def _ask(self, event: str, act: Callable[[], None]) -> None:
        self._seen = self.batch.follow(self._seen, event, act)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Find memory for tokens like these."""
        if key_states.shape != value_states.shape:
            raise ValueError("`cache`: pages are for keys and values of one size")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch.start(key_states.shape[0], key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write tokens [B Hk T D] into pages, and return them: what was there before stays there.

        Raises:
            OutOfPagesError: there is no room for them; then nothing has changed.
            RuntimeError: nobody has read the pages of the layer before: the model has no attention
                plan, or a call has failed midway.
        """
        if self.batch.is_unread:
            raise RuntimeError(
                "`past_key_values`: nobody has read the pages of the layer before: a call has "
                "failed, or the model has no `config.attention`, which pages go with"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("`past_key_values`: pages have no gradient, use torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (B, _, T, _), batch = key_states.shape, self.batch
        self._ask(f"update {T}", lambda: batch.write(B, T, key_states.device))
        self.tokens += T
        assert batch.slots is not None
        k, v = (t.transpose(1, 2).flatten(0, 1) for t in (key_states, value_states))
        write_pages(*self._pages, k, v, batch.slots.flatten())
        batch.is_unread = not batch.is_first
        return key_states, value_states

    @property
    def _pages(self) -> tuple[Tensor, Tensor]:
        return self.batch.pool.pages_of(self.index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attend to all tokens of each row."""
        self.batch.is_unread = False
        if self.batch.is_first:  # k and v are everything
            return cast("tuple[Tensor, Tensor]", flash_attention(q, k, v, **settings))
        # of a row's queries those are padding that stand before its first token: they see nothing
        del settings["leftpad_k"]
        used_q = settings.pop("seqused_q")
        del settings["seqused_k"]
        if used_q is not None:
            raise ValueError("`attention_mask`: a cache of pages takes padding to the left of rows")
        found = flash_attention(
            q, *self._pages, block_table=self.batch.table, seqused_k=self.batch.used,
            page_size=self.batch.pool.page_size, **settings,
        )  # fmt: skip
        return cast("tuple[Tensor, Tensor]", found)

    def rows_beside(self) -> float:
        """Return how many tokens ``attend`` reads beside what ``update`` gives: a mean of rows."""
        batch = self.batch
        if batch.tables is None or batch.is_first or batch.slots is None:
            return 0.0
        new = (batch.slots >= 0).sum(1).numpy(force=True)
        return float((batch.tables.lengths - new).mean())

    # --- what it holds

    def tensors(self) -> Iterator[Tensor]:
        """Yield the memory of the pool."""
        if self.batch.pool.store is not None:
            yield from self._pages

    # --- recorded steps

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it holds tokens of B rows, in that dtype, on that device."""
        tables, store = self.batch.tables, self.batch.pool.store
        if tables is None or store is None or not self.tokens:
            return False
        return tables.rows == B and store.dtype == dtype and store.device == device

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens of each row in pages that are its alone."""
        if self.index == 0:
            self.batch.reserve(new)

    def address(self) -> tuple[Tensor, ...]:
        """Return the memory of the pool; tables are among ``places``."""
        assert self.batch.pool.store is not None
        return (self.batch.pool.store,)

    def places_key(self) -> Hashable:
        """Return the batch."""
        return id(self.batch)

    def places(self, call: Call) -> Tensor:
        """Return slot, position, length and pages of each row, int32 [3 + N B]."""
        batch, tables = self.batch, self.batch.tables
        assert tables is not None
        new = batch.counts(batch.columns + 1) - batch.counts(batch.columns)
        B, N = tables.table.shape
        places = torch.empty((_TABLES + N, B), dtype=torch.int32)
        places[_SLOT] = tables.slots(new, 1)[:, 0]
        places[_POSITION] = call.position
        places[_USED] = torch.from_numpy(tables.lengths + new)
        places[_TABLES:].view(-1).copy_(torch.from_numpy(tables.table).view(-1))
        return places

    def advance(self, new: int) -> None:
        """Count ``new`` tokens of each row, which a step has written."""
        self._ask(f"advance {new}", lambda: self.batch.advance(new))
        self.tokens += new

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate queries and keys, store keys and values; return the queries [B 1 H D]."""
        # to every row the pool is one long memory, of which a slot is its own
        keys, values = (
            pages.flatten(0, 1)[None].expand(heads.shape[0], -1, -1, -1) for pages in self._pages
        )
        run = select("rotary_and_store", ROTARY_AND_STORE, heads.device)
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
        """Attend to the pages of each row."""
        # Triton is imported on first use
        from bitnet_triton.kernels.flash_attention.paged import launch_paged

        table = places[_TABLES:].view(-1).view(q.shape[0], -1)
        call = PagedCall(mask, scale, None, table, places[_USED])
        return launch_paged(q, *self._pages, call)

    def decode_objection(self, mask: Mask, sink_query: bool = False) -> str | None:
        """Say that pages are read as a whole."""
        if sink_query or mask != _CAUSAL:
            return "its cache keeps pages, which are read as a whole"
        return None

    # --- changes

    def can_take_back(self, n: int) -> bool:
        """It holds everything."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as minus ``tokens_to_remove`` says, or none for 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove`: expected at most 0, got {tokens_to_remove}")
        n = min(-int(tokens_to_remove), self.tokens)  # transformers 5.17 gives a tensor
        if n:
            self._ask(f"crop {n}", lambda: self.batch.crop(n))
            self.tokens -= n

    def reset(self) -> None:
        """Forget everything."""
        self._ask("reset", self.batch.clear)
        self.tokens, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search: their tables, not what they name."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._ask("repeat", lambda: self.batch.select(lambda t: t.repeat_interleave(repeats, 0)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        self._ask("select", lambda: self.batch.select(lambda t: t[indices.to(t.device)]))


def paged_layers(batch: Batch, layers: int) -> list[Any]:
    """Return the layers of a cache that have a batch in common."""
    batch.layers = layers
    return [PagedLayer(batch, index) for index in range(layers)]
