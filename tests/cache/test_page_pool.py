"""Random operations on a pool, its tables and its tree, beside what they should hold.

CI runs some thousand of them. 100,000 and more:
``PAGES_LONG=1 pytest tests/cache/test_page_pool.py``.
"""

import copy
import gc
import os

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bitnet_triton.cache.pages import PagePool, Pages, PrefixTree, Tables
from bitnet_triton.errors import OutOfPagesError

PAGE, PAGES, CAP = 4, 12, 7

# what fails is not made smaller: that takes minutes
COMMON = {
    "deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate],
    "database": None,
}  # fmt: skip
EXAMPLES, STEPS = (1300, 100) if os.environ.get("PAGES_LONG") else (80, 50)

# texts with a beginning in common, more often than not
LINES = [[0] * 12, [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1], [1] * 11]
ends = st.lists(st.integers(0, 1), max_size=4)
tokens = st.builds(
    lambda line, n, end: line[:n] + end, st.sampled_from(LINES), st.integers(1, 12), ends
)
pick = st.integers(0, 10**6)
namespaces = st.sampled_from(["a", "b"])


class Known:
    """A page of the tree: what stands in it, when it was asked for, how often it is pinned."""

    def __init__(self, stamps, used):
        self.stamps, self.used, self.pins = stamps, used, 0


class Machine(RuleBasedStateMachine):
    """Every token is written with a stamp of its own, so that a row shows whose page it reads."""

    @initialize(grows=st.booleans(), is_capped=st.booleans())
    def start(self, grows, is_capped):
        self.pool = PagePool(PAGE, None if grows else PAGES)
        self.pool.prepare(1, torch.zeros(1, 1, 1, 1))
        self.cap = CAP if is_capped else None
        self.tree = PrefixTree(self.pool, self.cap)
        # tables, and of each row its namespace and (token, stamp)s
        self.batches = []
        self.known, self.nodes = {}, {}  # (namespace, tokens) -> Known, Node
        self.stamp, self.time = 0, 0

    # --- the tree in plain words

    def is_leaf(self, key):
        namespace, text = key
        return not any(
            n == namespace and len(t) > len(text) and t[: len(text)] == text for n, t in self.known
        )

    def next_to_go(self, spared=(), unless=lambda key: False):
        ready = [
            key for key, known in self.known.items()
            if not known.pins and key not in spared and self.is_leaf(key) and not unless(key)
        ]  # fmt: skip
        return min(ready, key=lambda key: self.known[key].used, default=None)

    def is_read(self, key):
        page = self.nodes[key].page
        return any(page in tables.pages() for tables, _ in self.batches)

    def forget(self, key):
        del self.known[key], self.nodes[key]

    def give_up(self, pages):
        freed = 0
        while freed < pages:
            key = self.next_to_go(unless=self.is_read)
            if key is None:
                break
            self.forget(key)
            freed += 1
        return freed

    def prefixes(self, namespace, text):
        return [(namespace, tuple(text[:n])) for n in range(PAGE, len(text) + 1, PAGE)]

    # --- what happens

    def batch(self, which):
        if not self.batches:
            self.begin("a", [0])
        return self.batches[which % len(self.batches)]

    def reserve(self, tables, rows, new):
        """Reserve room; return whether there was any."""
        wanted, writers = 0, {}
        for row, n in enumerate(new):
            length = len(rows[row][1])
            wanted += max(-(-(length + n) // PAGE) - len(tables.pages_of(row)), 0)
            if n and length < len(tables.pages_of(row)) * PAGE:
                page = int(tables.pages_of(row)[length // PAGE])
                writers[page] = writers.get(page, 0) + 1
        for page, n in writers.items():
            names = sum((t.pages() == page).sum() for t, _ in self.batches)
            names += sum(node.page == page for node in self.nodes.values())
            wanted += min(n, names - 1)
        lacking = wanted - self.pool.free
        if lacking > 0:
            freed = self.give_up(lacking)
            if freed < lacking and self.pool.most is not None:
                before = tables.table.copy(), tables.lengths.copy(), tables.pages()
                message = f"{wanted} wanted.* {self.pool.free + freed} of {PAGES} are free"
                with pytest.raises(OutOfPagesError, match=message):
                    tables.reserve(np.array(new))
                after = tables.table, tables.lengths, tables.pages()
                assert all(map(np.array_equal, before, after))
                return False
        tables.reserve(np.array(new))
        tables.reserve(np.array(new))  # changes nothing
        return True

    @rule(namespace=namespaces, text=tokens)
    def begin(self, namespace, text):
        """Read what the tree has of a text."""
        if len(self.batches) > 5:
            return
        self.time += 1
        pages, _ = self.tree.match(text, namespace)
        found = []
        for key in self.prefixes(namespace, text):
            if key not in self.known:
                break
            self.known[key].used = self.time
            found += self.known[key].stamps
        assert len(pages) * PAGE == len(found)
        tables = Tables(self.pool, 1)
        # as where rows of a batch have less in common than the tree has of one
        length = max(len(found) - len(text) % 3, 0)
        tables.put(0, pages, length)
        self.batches.append((tables, [(namespace, list(zip(text, found))[:length])]))

    @rule(which=pick, text=tokens, short=st.integers(0, 3))
    def write(self, which, text, short):
        """Write tokens behind each row, fewer behind the later ones."""
        tables, rows = self.batch(which)
        new = [max(len(text) - short * row, 0) for row in range(len(rows))]
        if not self.reserve(tables, rows, new):
            return
        T = len(text) + 1  # one column is padding in all rows
        slots = tables.slots(np.array(new), T)
        assert slots.shape == (len(rows), T)
        flat = [pages.flatten(0, 1) for pages in self.pool.pages_of(0)]
        written = set()
        for row, n in enumerate(new):
            assert (slots[row, : T - n] == -1).all()
            for token, slot in zip(text[len(text) - n :], slots[row, T - n :].tolist()):
                self.stamp += 1
                flat[0][slot], flat[1][slot] = token, self.stamp
                rows[row][1].append((token, self.stamp))
                assert slot not in written
                written.add(slot)
        tables.advance(np.array(new))

    @rule(which=pick, n=st.integers(1, 6))
    def only_reserve(self, which, n):
        tables, rows = self.batch(which)
        self.reserve(tables, rows, [n] * len(rows))

    @rule(which=pick, order=st.lists(pick, min_size=1, max_size=3), deep=st.booleans())
    def fork(self, which, order, deep):
        if len(self.batches) > 5:
            return
        tables, rows = self.batch(which)
        order = list(range(len(rows))) if deep else [o % len(rows) for o in order]
        other = copy.deepcopy(tables) if deep else tables.fork(order)
        self.batches.append((other, [(rows[o][0], list(rows[o][1])) for o in order]))

    @rule(which=pick, order=st.lists(pick, min_size=1, max_size=3))
    def reorder(self, which, order):
        tables, rows = self.batch(which)
        order = [o % len(rows) for o in order]
        tables.select(lambda t: t[torch.tensor(order)])
        rows[:] = [(rows[o][0], list(rows[o][1])) for o in order]

    @rule(which=pick, n=st.integers(0, 9))
    def crop(self, which, n):
        tables, rows = self.batch(which)
        for row in rows:
            del row[1][max(len(row[1]) - n, 0) :]
        tables.crop(np.array([len(row[1]) for row in rows]))

    @rule(which=pick, keeps=st.booleans(), collected=st.booleans())
    def finish(self, which, keeps, collected):
        """Give a batch back: into the tree, or not at all."""
        if len(self.batches) < 3:
            return
        tables, rows = self.batch(which)
        self.batches.remove((tables, rows))
        for row, (namespace, text) in enumerate(rows if keeps else []):
            self.keep(namespace, text, tables.pages_of(row))
        if collected:
            del tables
            gc.collect(0)
        else:
            tables.clear()
            assert not len(tables.pages())

    def keep(self, namespace, text, pages):
        self.time += 1
        ids = [token for token, _ in text]
        path, inserted, known = [], [], 0
        for key in self.prefixes(namespace, ids):
            if key in self.known:
                known += 1
            else:
                if self.cap is not None and len(self.known) >= self.cap:
                    gone = self.next_to_go(spared=path[-1:])
                    if gone is None:
                        break
                    self.forget(gone)
                end = len(key[1])
                self.known[key] = Known([s for _, s in text[end - PAGE : end]], 0)
                self.nodes[key] = None
                inserted.append(key)
            self.known[key].used = self.time
            path.append(key)
        got, last = self.tree.insert(ids, pages, namespace)
        assert got == known
        for key in reversed(path):
            self.nodes[key], last = last, last.parent
        assert last.parent is None

    @rule(which=pick, up=st.booleans())
    def pin(self, which, up):
        if not self.known:
            return
        key = list(self.known)[which % len(self.known)]
        if up:
            self.tree.pin(self.nodes[key])
            self.known[key].pins += 1
        elif self.known[key].pins:
            self.tree.unpin(self.nodes[key])
            self.known[key].pins -= 1

    @rule(pages=st.integers(0, 5))
    def evict(self, pages):
        assert self.give_up(pages) == self.tree.evict(pages)

    @rule(sure=st.integers(0, 3))
    def clear(self, sure):
        if sure == 0:
            self.tree.clear()
            pinned = [(self.nodes[k], known.pins) for k, known in self.known.items()]
            for node, pins in pinned:
                for _ in range(pins):
                    self.tree.unpin(node)
            self.known, self.nodes = {}, {}

    # --- what always holds

    @invariant()
    def every_page_is_free_or_named_as_often_as_it_is(self):
        names = np.zeros_like(self.pool.counts)
        for tables, _ in self.batches:
            np.add.at(names, tables.pages(), 1)
        for _, node in self.tree.nodes():
            names[node.page] += 1
        free = self.pool.free  # which takes back what was collected
        assert np.array_equal(names, self.pool.counts)
        assert sorted(self.pool._free) == np.flatnonzero(names == 0).tolist()
        assert free + self.pool.used == len(names)

    @invariant()
    def every_row_reads_what_was_written_for_it(self):
        keys, stamps = (pages.flatten(1) for pages in self.pool.pages_of(0))
        for tables, rows in self.batches:
            assert tables.lengths.tolist() == [len(text) for _, text in rows]
            for row, (_, text) in enumerate(rows):
                pages = torch.from_numpy(tables.pages_of(row)).long()
                assert len(text) <= len(pages) * PAGE
                read = list(zip(keys[pages].flatten().tolist(), stamps[pages].flatten().tolist()))
                assert read[: len(text)] == text

    @invariant()
    def the_tree_has_the_texts_that_it_should(self):
        stamps = self.pool.pages_of(0)[1].flatten(1)
        assert len(self.tree) == len(self.known)
        assert self.cap is None or len(self.tree) <= self.cap
        assert {node for _, node in self.tree.nodes()} == set(self.nodes.values())
        for key, known in self.known.items():
            assert stamps[self.nodes[key].page].tolist() == known.stamps

    def teardown(self):
        if hasattr(self, "pool"):
            for tables, _ in self.batches:
                tables.clear()
            self.tree.clear()
            assert self.pool.free == len(self.pool.counts)


TestPoolAndTree = Machine.TestCase
TestPoolAndTree.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, **COMMON)


def test_a_pool_that_is_empty_says_how_much_was_wanted():
    pool = PagePool(16, most=4)
    tables = Tables(pool, 2)
    tables.reserve(np.array([20, 3]))
    assert (pool.free, pool.used) == (1, 3)
    with pytest.raises(OutOfPagesError, match=r"2 wanted \(32 tokens\), 1 of 4 are free, 3 in use"):
        tables.reserve(np.array([40, 20]))
    assert pool.free == 1


@pytest.mark.parametrize("most", [None, 24])
def test_neighbours_are_taken_first_however_pages_came_back(most):
    pool = PagePool(16, most)
    pages = pool.allocate(16)
    for at in torch.randperm(12).tolist():
        pool.release(pages[at : at + 1])
    assert pool.allocate(14).tolist() == [*range(12), 16, 17]  # the pool has grown, or had more


def test_pages_hold_hardly_more_than_a_prefix_and_its_tails():
    """64 texts behind 2048 tokens in common: at most a tenth more than their tokens, by default."""
    pool = Pages().pool()
    common = Tables(pool, 1)
    common.reserve(np.array([2048]))
    common.advance(np.array([2048]))
    batch = common.fork([0] * 64)
    batch.reserve(np.full(64, 131))
    tokens = 2048 + 64 * 131
    assert tokens <= pool.used * pool.page_size <= 1.1 * tokens
