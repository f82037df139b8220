"""Which pages the rows of a batch lie in: one table for all layers of a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bitnet_triton.cache.pages.pool import PagePool

_SPARE = 256  # tokens for which a table has room to spare


class Tables:
    """The pages of some sequences, and how many tokens each of them has.

    Token number p of a row lies at place ``p % page_size`` of page ``table[row, p // page_size]``.

    Args:
        pool: where they come from. All pages go back there when nobody has the tables any more.
        rows: how many sequences, which are empty.

    Attributes:
        lengths: int64 [B], tokens of each row.
        table: int32 [B N], of each row its pages, then whatever.
    """

    def __init__(self, pool: PagePool, rows: int = 0) -> None:
        self.pool = pool
        self.lengths = np.zeros(rows, dtype=np.int64)
        self._held = np.zeros(rows, dtype=np.int64)  # pages of each row, reserved ones included
        self.table = np.zeros((rows, 0), dtype=np.int32)

    def __del__(self) -> None:
        if hasattr(self, "pool"):  # torch.compile makes objects without calling __init__
            self.pool.abandon(self.pages())

    def __deepcopy__(self, memo: dict) -> Tables:
        return self.fork(np.arange(len(self.lengths)))

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    def pages(self) -> np.ndarray:
        """Return the pages of all rows, one behind the other."""
        is_held = np.arange(self.table.shape[1]) < self._held[:, None]
        return self.table[is_held]

    def pages_of(self, row: int) -> np.ndarray:
        """Return the pages of a row."""
        return self.table[row, : self._held[row]]

    def put(self, row: int, pages: np.ndarray, length: int) -> None:
        """Fill an empty row with pages that are named for it already, of which it has ``length``.

        What it does not need of them is released.
        """
        assert not self._held[row], "a row that is not empty"
        needed = -(-length // self.pool.page_size)
        self.pool.release(pages[needed:])
        self._widen(needed)
        self.table[row, :needed] = pages[:needed]
        self._held[row], self.lengths[row] = needed, length

    def reserve(self, new: np.ndarray) -> None:
        """Let each row have room for ``new`` [B] tokens in pages that are its alone.

        A row that shares its last page gets a copy of it. A second call changes nothing.

        Raises:
            OutOfPagesError: there are not enough pages; then nothing has changed.
        """
        needed = self._pages_for(self.lengths + new)
        missing = np.maximum(needed - self._held, 0)
        shared = self._shared_tails(new)
        total = int(missing.sum()) + len(shared)
        if not total:
            return
        fresh = self.pool.allocate(total)
        copies, fresh = fresh[: len(shared)], fresh[len(shared) :]
        for row, page in zip(shared, copies.tolist()):
            place = int(self.lengths[row]) // self.pool.page_size
            former = self.table[row, place : place + 1].copy()
            self.pool.copy(former, np.array([page], dtype=np.int32))
            self.table[row, place] = page
            self.pool.release(former)
        self._widen(int(needed.max()))
        for row in np.flatnonzero(missing).tolist():
            start, n = int(self._held[row]), int(missing[row])
            self.table[row, start : start + n] = fresh[:n]
            fresh = fresh[n:]
            self._held[row] += n

    def _shared_tails(self, new: np.ndarray) -> list[int]:
        """Return rows whose next token goes into a page that others name as well.

        Of rows that share one with nobody else, the last one keeps it.
        """
        page_size, rows = self.pool.page_size, []
        names: dict[int, int] = {}
        for row in np.flatnonzero((new > 0) & (self.lengths < self._held * page_size)).tolist():
            page = int(self.table[row, self.lengths[row] // page_size])
            left = names.setdefault(page, int(self.pool.counts[page]))
            if left > 1:
                names[page] -= 1
                rows.append(row)
        return rows

    def slots(self, new: np.ndarray, T: int) -> Tensor:
        """Return where the last ``new`` [B] of T columns go, int64 [B T]; -1: nowhere.

        Room for them is reserved.
        """
        size = self.pool.page_size
        place = np.arange(T) - T + new[:, None] + self.lengths[:, None]
        is_new = np.arange(T) >= T - new[:, None]
        page = np.minimum(np.maximum(place, 0) // size, max(self.table.shape[1] - 1, 0))
        pages = np.take_along_axis(self.table, page, 1)
        assert not (self.pool.counts[pages[is_new]] != 1).any(), "a page with two writers"
        slots = np.where(is_new, pages.astype(np.int64) * size + place % size, -1)
        return torch.from_numpy(slots)

    def advance(self, new: np.ndarray) -> None:
        """Count ``new`` [B] tokens as held, which somebody writes."""
        self.lengths = self.lengths + new

    def crop(self, lengths: np.ndarray) -> None:
        """Forget what is behind ``lengths`` [B], with the pages that hold nothing else."""
        needed = self._pages_for(lengths)
        released = [
            self.table[row, needed[row] : self._held[row]]
            for row in np.flatnonzero(needed < self._held).tolist()
        ]
        if released:
            self.pool.release(np.concatenate(released))
        self._held = np.minimum(self._held, needed)
        self.lengths = lengths.copy()

    def fork(self, rows: Sequence[int] | np.ndarray) -> Tables:
        """Return tables of some rows, in that order, one perhaps several times; copy nothing."""
        other = Tables(self.pool)
        other.lengths, other._held = self.lengths[rows], self._held[rows]
        other.table = self.table[rows]
        # what is reserved is nobody else's
        self.pool.retain(other.pages())
        other.crop(other.lengths)
        return other

    def select(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change rows as ``change`` changes a tensor of them."""
        other = self.fork(change(torch.arange(self.rows)).numpy())
        self.lengths, other.lengths = other.lengths, self.lengths
        self._held, other._held = other._held, self._held
        self.table, other.table = other.table, self.table
        other.clear()

    def clear(self) -> None:
        """Give all pages back."""
        self.crop(np.zeros_like(self.lengths))

    def _pages_for(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.pool.page_size)

    def _widen(self, needed: int) -> None:
        if needed > self.table.shape[1]:
            spare = max(needed // 4, _SPARE // self.pool.page_size)
            self.table = np.pad(self.table, ((0, 0), (0, needed + spare - self.table.shape[1])))
