"""Requests of continuous batching that wait for the pages which another is just filling.

transformers' engine shares whole pages of prompts, once they are full. Requests with a common
prefix that come together find none full, and each of them computes the prefix. Here the first of
them does, and the others are left in the queue until its pages are there.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers.generation.continuous_batching.scheduler import (
    FIFOScheduler,
    PrefillFirstScheduler,
)

logger = logging.getLogger("bitnet_triton")


class WaitingFIFO(FIFOScheduler):
    """transformers' scheduler of requests as they come."""

    page_names: PageNames

    def _get_waiting_candidates(self) -> list[Any]:
        return who_begins(self, super()._get_waiting_candidates(), self.page_names)


class WaitingPrefillFirst(PrefillFirstScheduler):
    """transformers' scheduler that ends prompts first."""

    page_names: PageNames

    def _get_waiting_candidates(self) -> list[Any]:
        return who_begins(self, super()._get_waiting_candidates(), self.page_names)


_KINDS: dict[type, Any] = {
    FIFOScheduler: WaitingFIFO,
    PrefillFirstScheduler: WaitingPrefillFirst,
}


def let_wait(scheduler: Any) -> None:
    """Let requests wait for the pages that another fills; a scheduler of another kind stays."""
    kind = _KINDS.get(type(scheduler))
    if kind is None:
        logger.info(
            "scheduler %s: requests that come together each compute their common prefix",
            type(scheduler).__name__,
        )
        return
    scheduler.page_names = PageNames()
    scheduler.__class__ = kind  # the engine holds it in several places


def who_begins(scheduler: Any, waiting: list[Any], page_names: PageNames) -> list[Any]:
    """Return which of the waiting requests may begin in this step, in their order.

    The first one always may, unless a request that is active fills its next page.
    """
    cache = scheduler.cache
    if not cache.use_prefix_sharing:
        return waiting
    active = scheduler.active_requests
    page_names.keep(active.keys() | {state.request_id for state in waiting})
    coming: set[int] = set()
    for state in active.values():
        if state.generated_len() == 0:  # its prompt is being computed
            coming.update(page_names.missing(state, cache))
    begin = []
    for state in waiting:
        if not state.is_cpu_offloaded:  # those come back with their pages
            missing = page_names.missing(state, cache)
            if missing and missing[0] in coming:
                continue
            coming.update(missing)
        begin.append(state)
    return begin


class PageNames:
    """What the engine calls the whole pages of prompts, which may be shared."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[int, list[int]]] = {}

    def keep(self, requests: set[str]) -> None:
        """Forget all other requests."""
        self._names = {name: value for name, value in self._names.items() if name in requests}

    def missing(self, state: Any, cache: Any) -> list[int]:
        """Return the names of a prompt's pages behind those that it could begin with now."""
        names = self._of(state, next(iter(cache.cache_allocators.values())).tokens_per_page)
        return names[cache.pages_held(names) :]

    def _of(self, state: Any, page_size: int) -> list[int]:
        from bitnet_triton.models.window_pages import names_of  # transformers 5.23 or later

        prompt = state.initial_tokens
        length, names = self._names.get(state.request_id, (-1, []))
        if length != len(prompt):  # a request that is put off comes again with what it has written
            pages = (len(prompt) - 1) // page_size  # one token is left to compute
            names = names_of(prompt, page_size, [], pages)
            self._names[state.request_id] = len(prompt), names
        return names
