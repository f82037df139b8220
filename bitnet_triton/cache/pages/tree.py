"""A tree of texts whose pages are kept: who comes with the same beginning reads it from there.

A node is a page of tokens behind those of its parent (SGLang, arXiv:2312.07104, in whole pages).
Equal tokens under another namespace, by another adapter or other rotary settings, never meet.
Tokens are compared, not hashes of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitnet_triton.cache.pages.pool import PagePool


@dataclass(eq=False)
class Node:
    """A page of tokens, and what comes behind it.

    Attributes:
        key: its tokens, in bytes.
        page: in the pool; -1: the root of a namespace.
        parent: the page before it; None: a root.
        children: pages behind it, by their tokens.
        pins: how often somebody wants it kept.
        used: when it was last asked for.
    """

    key: bytes
    page: int
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    pins: int = 0
    used: int = 0


class PrefixTree:
    """Texts in whole pages of a pool, up to a cap; the one that nobody has asked for longest goes.

    Args:
        pool: whose pages they are; the tree gives pages back when the pool runs out of them.
        most: pages that it holds at most; None: as many as the pool has.
    """

    def __init__(self, pool: PagePool, most: int | None = None) -> None:
        self.pool, self.most = pool, most
        self._roots: dict[Hashable, Node] = {}
        self._held = 0
        self._clock = itertools.count(1)
        self._order = itertools.count()  # of equal times the heap asks no node
        self._leaves: list[tuple[int, int, Node]] = []  # with what is no such leaf any more
        self._lock = pool.lock  # one for both: each calls the other
        pool.reclaim_by(self.evict)

    def __len__(self) -> int:
        """Return how many pages it holds."""
        return self._held

    def match(
        self, tokens: Sequence[int] | np.ndarray, namespace: Hashable = None
    ) -> tuple[np.ndarray, Node]:
        """Find the longest beginning of ``tokens`` that is there.

        The pages are named once more: whoever gets them releases them.

        Returns:
            its pages, int32, and the last node, for ``pin``.
        """
        with self._lock:
            node, pages = self._roots.get(namespace, Node(b"", -1, None)), []
            now = next(self._clock)
            for key in self._keys(tokens):
                child = node.children.get(key)
                if child is None:
                    break
                node = child
                node.used = now
                pages.append(node.page)
            self._may_go(node)
            found = np.array(pages, dtype=np.int32)
            self.pool.retain(found)
            return found, node

    def insert(
        self,
        tokens: Sequence[int] | np.ndarray,
        pages: Sequence[int] | np.ndarray,
        namespace: Hashable = None,
    ) -> tuple[int, Node]:
        """Keep a text; of what is there already, the tree keeps its own pages.

        Args:
            tokens: of the text; the last ones, which fill no page, are left out.
            pages: in which they lie. The tree names those that it takes once more.
            namespace: what keys and values depend on beside the tokens.

        Returns:
            How many pages of the text were there before, and the last node that is there now: where
            the cap is reached and everything is pinned, not the last one of the text.
        """
        with self._lock:
            node, known = self._roots.setdefault(namespace, Node(b"", -1, None)), 0
            now = next(self._clock)
            for key, page in zip(self._keys(tokens), pages):
                child = node.children.get(key)
                if child is not None:
                    known += 1
                elif self._has_room(node):
                    child = node.children[key] = Node(key, int(page), node)
                    self.pool.retain(np.array([page], dtype=np.int32))
                    self._held += 1
                else:
                    break
                node = child
                node.used = now
            self._may_go(node)
            return known, node

    def pin(self, node: Node) -> None:
        """Keep a text, with all that comes before it, until it is unpinned as often."""
        with self._lock:
            node.pins += 1

    def unpin(self, node: Node) -> None:
        """Take ``pin`` back once."""
        with self._lock:
            assert node.pins > 0, "a text is unpinned more often than it was pinned"
            node.pins -= 1
            self._may_go(node)

    def evict(self, pages: int) -> int:
        """Give up texts, those first that were not asked for longest, until pages are free.

        What is pinned stays, and what some sequence reads: that would free nothing.

        Args:
            pages: how many are wanted.

        Returns:
            How many are free now that were not.
        """
        freed, in_use = 0, []
        with self._lock:
            while freed < pages:
                entry = self._pop()
                if entry is None:
                    break
                if self.pool.is_shared(entry[2].page):
                    in_use.append(entry)
                else:
                    freed += self._drop(entry[2])
            for entry in in_use:
                heapq.heappush(self._leaves, entry)
        return freed

    def clear(self) -> None:
        """Give up all texts, pinned or not."""
        with self._lock:
            nodes = [node for root in self._roots.values() for node in _below(root)]
            self.pool.release(np.array([node.page for node in nodes], dtype=np.int32))
            for node in nodes:
                node.parent = None  # whoever has pinned it may still unpin it
            self._roots, self._leaves, self._held = {}, [], 0

    def nodes(self) -> Iterator[tuple[Hashable, Node]]:
        """Yield every page of every text, with its namespace; each behind its parent."""
        for namespace, root in self._roots.items():
            for node in _below(root):
                yield namespace, node

    # ---

    def _keys(self, tokens: Sequence[int] | np.ndarray) -> Iterator[bytes]:
        size = self.pool.page_size
        flat = np.asarray(tokens, dtype=np.int64)
        for start in range(0, len(flat) - size + 1, size):
            yield flat[start : start + size].tobytes()

    def _has_room(self, behind: Node) -> bool:
        """Make room for a page behind ``behind``, which stays; tell whether there is."""
        if self.most is None or self._held < self.most:
            return True
        behind.pins += 1
        entry = self._pop()
        behind.pins -= 1
        if entry is not None:
            self._drop(entry[2])
        return entry is not None

    def _may_go(self, node: Node) -> None:
        """Take note of a node that is given up, when its time has come, if nothing is behind it."""
        if node.parent is None or node.children or node.pins:
            return
        heapq.heappush(self._leaves, (node.used, next(self._order), node))
        if len(self._leaves) > 2 * self._held + 64:
            live = {id(entry[2]): entry for entry in self._leaves if self._is_live(entry)}
            self._leaves = list(live.values())
            heapq.heapify(self._leaves)

    def _is_live(self, entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        is_leaf = not node.children and not node.pins and node.parent is not None
        return is_leaf and node.used == used

    def _pop(self) -> tuple[int, int, Node] | None:
        """Take the leaf out of the heap that nobody has asked for longest."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if self._is_live(entry):
                return entry
        return None

    def _drop(self, node: Node) -> int:
        """Give up a leaf; return whether its page is free now."""
        parent, node.parent = node.parent, None
        assert parent is not None
        del parent.children[node.key]
        self._held -= 1
        self._may_go(parent)
        return self.pool.release(np.array([node.page], dtype=np.int32))


def _below(root: Node) -> Iterator[Node]:
    waiting = list(root.children.values())
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()
