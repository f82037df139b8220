"""Pages of layers that see a window, inside transformers' continuous batching (5.23).

transformers keeps a ring of rows for such layers, gathers it, and shares no prefix beside it. Here
they have pages as other layers have: a request names all of its pages in order, and gives back
those that no query of it will see any more. What is given back stays for others that begin alike,
until memory is short. Such a prefix needs the pages of its last window alone.
"""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    BlockLedger,
    compute_block_hash,
)

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.kernels import Mask

# Stands where a page was given back: lies in memory that the engine gives to no request
GONE = 0


def names_of(tokens: list[int], page_size: int, known: list[int], pages: int) -> list[int]:
    """Return what the engine calls the first ``pages`` pages of a text.

    Args:
        tokens: of the text.
        page_size: tokens of a page.
        known: names of pages from the first one on; not changed.
        pages: how many names are wanted.
    """
    names = known[:pages]
    for at in range(len(names), pages):
        page = tokens[at * page_size : (at + 1) * page_size]
        names.append(compute_block_hash(names[-1] if names else None, page))
    return names


class WindowLedger(BlockLedger):
    """transformers' counts of who holds a page, which pass over places without one."""

    def acquire(self, block_id: int) -> None:
        """Count one more holder."""
        if block_id != GONE:
            super().acquire(block_id)

    def release(self, block_id: int, no_cache: bool = False) -> bool:
        """Count one holder less; tell whether the page is free."""
        return block_id != GONE and super().release(block_id, no_cache)


class WindowPages(FullAttentionCacheAllocator):
    """Who gives out the pages of layers with a window, and of the first tokens beside it.

    Attributes:
        sliding_window: keys that a query sees in the layer that looks furthest, itself included.
        sink_pages: pages of the first tokens that every query sees.
    """

    layer_type = "sliding_attention"
    supports_block_table = False
    sliding_window: int
    sink_pages: int
    _names: dict[str, list[int]]

    def begin(self, sinks: int, is_shared: bool) -> None:
        """Become one of these; transformers has made its own kind, with the same memory."""
        self.sink_pages = -(-sinks // self.tokens_per_page)
        self.use_block_sharing = is_shared
        self.ledger = WindowLedger()
        self._names = {}

    def gap(self, position: int) -> tuple[int, int]:
        """Return the first page that no query from ``position`` on sees, and the one behind."""
        first = max(position - self.sliding_window + 1, 0) // self.tokens_per_page
        return self.sink_pages, max(first, self.sink_pages)

    def give_back(self, request_id: str, position: int) -> None:
        """Give back the pages of a request that no query from ``position`` on sees."""
        table = self.block_table[request_id]
        start, end = self.gap(position)
        freed = []
        for at in reversed(range(start, min(end, len(table)))):
            page = table[at]
            if page == GONE:
                break  # and so are those before
            table[at] = GONE
            if self.ledger.release(page):
                freed.append(page)
        self.pool.free_blocks(self.index, freed)

    def has(self, names: list[int], pages: int) -> bool:
        """Tell whether all of its first ``pages`` pages are there that a text needs behind them."""
        start, end = self.gap(pages * self.tokens_per_page)
        there = self.ledger.hash_to_block
        latest = (names[at] in there for at in reversed(range(end, pages)))
        return all(latest) and all(name in there for name in names[: min(start, pages)])

    def take(self, request_id: str, names: list[int]) -> None:
        """Let a request begin behind the pages of these names."""
        start, end = self.gap(len(names) * self.tokens_per_page)
        there = self.ledger.hash_to_block
        table = [GONE if start <= at < end else there[name] for at, name in enumerate(names)]
        for page in table:
            self.ledger.acquire(page)
        self.block_table[request_id] = table
        self._names[request_id] = names

    def mark_complete_blocks(
        self, request_id: str, token_ids: list[int], new_new_blocks: int
    ) -> None:
        """Name the pages that a step has filled, and hold those that are there already."""
        known = self._names.get(request_id, [])
        whole = min(len(known) + new_new_blocks, len(token_ids) // self.tokens_per_page)
        names = names_of(token_ids, self.tokens_per_page, known, whole)
        table = self.block_table[request_id]
        for at in range(len(known), whole):
            page = table[at]
            if page == GONE:
                continue  # given back by an asynchronous engine, which prepares a step ahead
            same = self.ledger.register_new_hash(page, names[at])
            if same is not None:
                self.ledger.acquire(same)
                table[at] = same
                if self.ledger.release(page):
                    self.pool.free_blocks(self.index, [page])
        self._names[request_id] = names

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Let go of a request."""
        super().free_blocks(request_id, no_cache)
        self._names.pop(request_id, None)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        """Let a request go on from where another one is; return what is to be copied, and where."""
        if source_request_id in self._names:
            self._names[dest_request_id] = self._names[source_request_id]
        return super().fork_blocks(source_request_id, dest_request_id, past_length)

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Return how many keys a step reads: those of pages that were not given back."""
        start, end = self.gap(past_length)
        return past_length + query_length - (end - start) * self.tokens_per_page

    def pages_read(self, table: list[int], past_length: int) -> list[int]:
        """Return the pages of a table that queries from ``past_length`` on see."""
        start, end = self.gap(past_length)
        return table[:start] + table[end:]


class PlannedPages(PagedAttentionCache):
    """transformers' pages, with what each layer sees of them.

    Attributes:
        plan: of the model; None: all layers see everything.
        masks: what each layer sees.
        windows: who gives out pages of layers with a window, one or nobody.
        others: who gives out those of layers that see everything.
    """

    plan: AttentionPlan | None
    masks: list[Mask]
    windows: list[WindowPages]
    others: list[Any]

    def begin(self, plan: AttentionPlan | None, masks: list[Mask]) -> None:
        """Become one of these; transformers has made its own kind, with the same memory."""
        self.plan, self.masks = plan, masks
        self.use_prefix_sharing = self.allow_block_sharing
        every: list[Any] = list(self.cache_allocators.values())
        self.windows = [one for one in every if one.layer_type == WindowPages.layer_type]
        self.others = [one for one in every if one.layer_type != WindowPages.layer_type]
        for allocator in self.windows:
            allocator.__class__ = WindowPages
            allocator.begin(max(mask.sinks for mask in masks), self.allow_block_sharing)
        if not self.others:
            (window,) = self.windows
            pages = window.sink_pages + 1  # a window begins in the middle of a page
            self.read_cache_limit = window.sliding_window + pages * window.tokens_per_page

    def pages_held(self, names: list[int]) -> int:
        """Return how many of the first pages of a text a request could begin behind."""
        pages = len(names)
        for allocator in self.others:
            there = allocator.ledger.hash_to_block
            pages = next((at for at in range(pages) if names[at] not in there), pages)
        for window in self.windows:
            while pages and not window.has(names, pages):
                pages -= 1
        return pages

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Let a request begin behind the longest prefix that is there; return its tokens."""
        if not self.use_prefix_sharing:
            return 0
        size = next(iter(self.cache_allocators.values())).tokens_per_page
        names = names_of(prompt_ids, size, [], (len(prompt_ids) - 1) // size)  # one token is left
        names = names[: self.pages_held(names)]
        if names:
            for window in self.windows:
                window.take(request_id, names)
            for allocator in self.others:
                held = [allocator.ledger.hash_to_block[name] for name in names]
                allocator.acquire_prefix_blocks(request_id, len(names) * size, held)
        return len(names) * size

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Name the pages that a step has filled; give back those that nobody will see."""
        super().mark_complete_blocks(state, complete_blocks)
        for window in self.windows:
            if state.request_id in window.block_table:
                window.give_back(state.request_id, state.current_len())

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Note the pages that a request reads, and the slots that it writes.

        transformers notes the slot of every key; attention over pages asks for pages.
        """
        for allocator, slots in zip(self.cache_allocators.values(), write_index):
            slots.extend(allocator.get_write_indices(request_id, past_length, query_length))
        if read_index is None:
            return
        for allocator, pages in zip(self.cache_allocators.values(), read_index):
            # a request with children has room for one token more than this step computes
            count = -(-(past_length + query_length) // allocator.tokens_per_page)
            held = allocator.block_table[request_id][:count]
            if allocator in self.windows:
                held = allocator.pages_read(held, past_length)
            stride = allocator.block_physical_stride // allocator.tokens_per_page
            pages.extend(page * stride for page in held)
