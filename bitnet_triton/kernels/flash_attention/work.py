"""What a mask costs: the tiles of keys that the forward kernel loads, in closed form.

The arithmetic of ``tiles.py`` on Python's integers, a tile of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.kernels.flash_attention.bands import BEFORE, CLASS, Band, bands_of, dense_band
from bitnet_triton.kernels.flash_attention.description import MaskDescription

_LISTED_TILE = 32  # of keys that everybody sees


@dataclass(frozen=True)
class Work:
    """Tiles of keys, summed over the tiles of queries of all heads.

    Attributes:
        tiles: that the kernel loads under the mask.
        dense: that it loads without one, save for causality.
    """

    tiles: int
    dense: int

    @property
    def share(self) -> float:
        """The part of dense attention that is left to do."""
        return self.tiles / max(self.dense, 1)


@dataclass(frozen=True)
class _Rows:
    """A tile of rows: the R of the first and the last one, their class and how they are numbered.

    ``positions`` are those of the rows that the launch computes.
    """

    first: int
    last: int
    c: int
    step: int
    positions: tuple[int, ...]


def count_work(
    mask: MaskDescription, Tq: int, Tk: int, heads: int, block_m: int, block_n: int
) -> Work:
    """Count tiles of ``block_m`` queries and ``block_n`` keys; see ``Mask.work``."""
    if isinstance(mask.global_tokens, Tensor) or isinstance(mask.dense_from, Tensor):
        raise TypeError("`mask`: its work depends on values in tensors; give numbers instead")
    tokens = frozenset(mask.global_tokens or ())
    offset = Tk - Tq
    dense_from = Tk if mask.dense_from is None else mask.dense_from
    dense_rows = [p for p in range(offset, Tk) if p in tokens or p >= dense_from]
    everyone = sorted({*range(min(mask.sinks, Tk)), *(t for t in tokens if t < Tk)})
    everything = dense_band(mask.causal)
    dense = heads * sum(
        _tiles(everything, rows, 0, Tk, 0, block_n)
        for rows in _class_tiles(offset, Tq, 1, block_m, frozenset())
    )
    done = frozenset(dense_rows)
    visited = 0
    for number, band in enumerate(bands_of(mask)):
        for head in range(heads):
            step = band.heads[head % len(band.heads)][0]
            for rows in _class_tiles(offset, Tq, step, block_m, done):
                visited += _tiles(band, rows, head, Tk, mask.sinks, block_n)
                if number == 0:
                    visited += _listed_tiles(everyone, rows, mask.causal, block_n)
    for at in range(0, len(dense_rows), block_m):
        part = tuple(dense_rows[at : at + block_m])
        rows = _Rows(part[0], part[-1], 0, 1, part)
        visited += heads * _tiles(everything, rows, 0, Tk, 0, block_n)
    return Work(visited, dense)


def _class_tiles(
    offset: int, Tq: int, step: int, block: int, done: frozenset[int]
) -> Iterator[_Rows]:
    """Yield the tiles of each class of rows; rows in ``done`` belong to another launch."""
    for i0 in range(min(step, Tq)):
        R0, c = divmod(i0 + offset, step)
        n = -(-(Tq - i0) // step)
        for r in range(0, n, block):
            last = min(r + block, n) - 1
            positions = range(c + step * (R0 + r), c + step * (R0 + last) + 1, step)
            kept = tuple(p for p in positions if p not in done)
            yield _Rows(R0 + r, R0 + last, c, step, kept)


def _tiles(band: Band, rows: _Rows, head: int, Tk: int, sinks: int, block_n: int) -> int:
    if not rows.positions:
        return 0
    low, _ = row_interval(band, head, rows.first, rows.c, Tk, sinks)
    _, high = row_interval(band, head, rows.last, rows.c, Tk, sinks)
    return max(-(-(high - low) // block_n), 0)


def _listed_tiles(everyone: list[int], rows: _Rows, causal: bool, block_n: int) -> int:
    last = max(rows.positions, default=-1) if causal else everyone[-1] if everyone else -1
    return -(-sum(j <= last for j in everyone) // min(block_n, _LISTED_TILE))


def row_interval(band: Band, head: int, R: int, c: int, Tk: int, sinks: int) -> tuple[int, int]:
    """Return the first key, by its number in the band, that row R sees, and the one behind."""
    step, left, right, _ = band.heads[head % len(band.heads)]
    b, s = band.block or 1, band.summary or 0
    if band.kind == CLASS:
        low = max(R - left, 0, -((c - sinks) // step))
        high = min(R + right + 1, -((c - Tk) // step))
        if band.block is not None:
            start = (c + step * R) // b * b - c
            low = max(low, -(-start // step))
            high = min(high, -(-(start + b) // step))
        return low, high
    own = R // b * s
    low = max(_summaries(R - left, b, s), _summaries(sinks, b, s))
    high = min(_summaries(R + right + 1, b, s), _summaries(Tk, b, s))
    return (low, min(high, own)) if band.kind == BEFORE else (max(low, own + s), high)


def _summaries(x: int, block: int, summary: int) -> int:
    """Count the summary keys in front of position x."""
    x = max(x, 0)
    return x // block * summary + max(x % block - (block - summary), 0)
