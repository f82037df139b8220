"""Pages of keys and values, counted (arXiv:2309.06180): who names one, who may write to it.

A page holds some tokens in a row, of all layers. Whoever names it counts: each table of a sequence,
and the prefix tree. A page with more than one of them is never written to; a sequence that wants to
gets a copy of its own first. So sequences with a common beginning share its pages, and a fork costs
a list of numbers.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitnet_triton.errors import OutOfPagesError
from bitnet_triton.kernels import copy_pages
from bitnet_triton.runtime.huge_pages import in_huge_pages

_FEWEST = 16  # pages that a pool without a cap gets at first


class PagePool:
    """Pages, how often each of them is named, and the memory behind them.

    Args:
        page_size: tokens of a page, a power of two.
        most: pages that there are; None: as many as are asked for.

    Attributes:
        counts: int32 [P], by how many tables, and by the tree, each page is named.
        lock: of the pool and of the tree.
        store: [layers 2 Hk P page_size D], keys and values; None before the first tokens. To a head
            pages that follow one another are one run of memory, as in a cache without pages.
    """

    def __init__(self, page_size: int, most: int | None = None) -> None:
        self.page_size, self.most = page_size, most
        self.counts = np.zeros(0, dtype=np.int32)
        self.store: Tensor | None = None
        # a heap: who takes the first ones gets neighbours, however pages came back
        self._free: list[int] = []
        self._reclaim: Callable[[int], object] | None = None
        self._abandoned: deque[np.ndarray] = deque()
        self.lock = threading.RLock()
        self._grow(_FEWEST if most is None else most)

    def __deepcopy__(self, memo: dict) -> PagePool:
        return self  # its users name its pages anew, nobody copies them

    # --- counts

    @property
    def free(self) -> int:
        """How many pages nobody names."""
        self._take_back()
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages somebody names."""
        return len(self.counts) - self.free

    def reclaim_by(self, reclaim: Callable[[int], object]) -> None:
        """Let somebody release so many pages, if he can, before the pool is out of them."""
        self._reclaim = reclaim

    def allocate(self, n: int) -> np.ndarray:
        """Return ``n`` pages, int32, each of which is named once from now on: the first free ones.

        Raises:
            OutOfPagesError: there are not so many; then none is taken.
        """
        with self.lock:
            self._take_back()
            lacking = n - len(self._free)
            if lacking > 0 and self._reclaim is not None:
                self._reclaim(lacking)
                lacking = n - len(self._free)
            if lacking > 0:
                if self.most is not None:
                    raise OutOfPagesError(
                        f"out of pages: {n} wanted ({n * self.page_size} tokens), "
                        f"{len(self._free)} of {self.most} are free, {self.used} in use; give the "
                        "pool more tokens, or fewer and shorter texts at a time"
                    )
                self._grow(max(len(self.counts) // 4, lacking))
            pages = np.array([heapq.heappop(self._free) for _ in range(n)], dtype=np.int32)
            self.counts[pages] = 1
            return pages

    def retain(self, pages: np.ndarray) -> None:
        """Name pages once more; one may stand there several times."""
        if len(pages):
            with self.lock:
                assert self.counts[pages].all(), "a page that nobody names"
                self.counts += np.bincount(pages, minlength=len(self.counts)).astype(np.int32)

    def release(self, pages: np.ndarray) -> int:
        """Name pages once less, and return how many nobody names any more."""
        if not len(pages):
            return 0
        with self.lock:
            times = np.bincount(pages, minlength=len(self.counts)).astype(np.int32)
            assert (times <= self.counts).all(), "a page is released more often than it is named"
            self.counts -= times
            freed = np.flatnonzero((times > 0) & (self.counts == 0)).tolist()
            for page in freed:
                heapq.heappush(self._free, page)
            return len(freed)

    def abandon(self, pages: np.ndarray) -> None:
        """Release pages some time later: for finalizers, which run in the middle of anything."""
        self._abandoned.append(pages)

    def _take_back(self) -> None:
        with self.lock:
            while self._abandoned:
                self.release(self._abandoned.popleft())

    def is_shared(self, page: int) -> bool:
        """Tell whether a page has more than one name, so that nobody may write to it."""
        return bool(self.counts[page] > 1)

    # --- memory

    def prepare(self, layers: int, like: Tensor) -> None:
        """Find memory for heads like those of ``like`` [B Hk T D], in its dtype, on its device.

        Raises:
            ValueError: there is memory already, for others.
        """
        sizes = (layers, 2, like.shape[1], len(self.counts), self.page_size, like.shape[3])
        if self.store is None:
            self.store = self._empty(sizes, like)
        elif (
            self.store.shape != sizes
            or self.store.dtype != like.dtype
            or self.store.device != like.device
        ):
            raise ValueError(
                f"`past_key_values`: the pool has pages of {list(self.store.shape)} "
                f"[layers 2 Hk P page D] in {self.store.dtype} on {self.store.device}, this model "
                f"wants {list(sizes)} in {like.dtype} on {like.device}"
            )

    def pages_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, [P page_size Hk D]."""
        assert self.store is not None
        keys, values = self.store[layer].permute(0, 2, 3, 1, 4)
        return keys, values

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy pages in all layers."""
        if self.store is None or not len(sources):
            return
        pages = self.store.flatten(0, 3)
        first = np.arange(0, len(pages), len(self.counts))[:, None]
        pairs = np.stack([first + sources, first + targets], -1).reshape(-1, 2)
        copy_pages(pages, torch.from_numpy(pairs).to(pages.device))

    def _grow(self, more: int) -> None:
        size = len(self.counts)
        self.counts = np.concatenate([self.counts, np.zeros(more, dtype=np.int32)])
        self._free += range(size, size + more)  # behind all others: still a heap
        if self.store is not None:
            layers, _, Hk, _, *rest = self.store.shape
            larger = self._empty((layers, 2, Hk, size + more, *rest), self.store)
            larger[:, :, :, :size].copy_(self.store)
            self.store = larger

    @staticmethod
    def _empty(sizes: tuple[int, ...], like: Tensor) -> Tensor:
        with torch.inference_mode(False):  # or nobody outside of it may write
            return in_huge_pages(torch.empty(sizes, dtype=like.dtype, device=like.device))
