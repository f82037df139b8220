"""MergedTernaryWeight: matrices that multiply the same activations, as one packed matrix.

Each part keeps the byte rows that it has alone, so that it is a view of the whole: byte row r of a
part of R byte rows holds the rows r, r + R, r + 2 R and r + 3 R of that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.packing import CODES_PER_BYTE, TernaryWeight
from bitnet_triton.runtime import cdiv

MOST_PARTS = 3  # queries, keys and values


@dataclass(frozen=True, eq=False)
class MergedTernaryWeight:
    """Up to three ternary matrices [N_i, K] below one another, each with its own scale.

    Build one with ``merge``; ``parts`` are views of it.

    Attributes:
        packed: uint8 [sum N_i / 4, K], the bytes of one matrix after those of another.
        scale: float32, one for each matrix.
        rows: N_i / 4 of each matrix.
    """

    packed: Tensor
    scale: Tensor
    rows: tuple[int, ...]

    @classmethod
    def merge(cls, weights: Sequence[TernaryWeight]) -> MergedTernaryWeight:
        """Copy ``weights`` into one matrix.

        Raises:
            ValueError: there are none or more than three, they differ in K or are not on one
                device.
        """
        if not 1 <= len(weights) <= MOST_PARTS:
            raise ValueError(f"`weights`: expected 1 to {MOST_PARTS}, got {len(weights)}")
        for name, values in (
            ("K", {weight.shape[1] for weight in weights}),
            ("device", {weight.device for weight in weights}),
        ):
            if len(values) > 1:
                found = ", ".join(sorted(map(str, values)))
                raise ValueError(f"`weights`: expected one {name}, got {found}")
        return cls(
            torch.cat([weight.packed for weight in weights]),
            torch.cat([weight.scale for weight in weights]),
            tuple([weight.packed.shape[0] for weight in weights]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the unpacked matrix, (sum N_i, K)."""
        rows, K = self.packed.shape
        return rows * CODES_PER_BYTE, K

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.packed.device

    def parts(self) -> tuple[TernaryWeight, ...]:
        """Return the matrices, as views."""
        packed, scale = self.packed.split(list(self.rows)), self.scale.split(1)
        return tuple([TernaryWeight(p, s) for p, s in zip(packed, scale)])


def count_tiles(rows: Sequence[int], BLOCK_R: int) -> int:
    """Return the number of tiles of parts with ``rows`` byte rows each."""
    return sum([cdiv(r, BLOCK_R) for r in rows])


def part_ends(rows: Sequence[int]) -> tuple[int, int]:
    """Return where the first and the second of at most three parts end."""
    end0 = rows[0]
    return end0, end0 + rows[1] if len(rows) > 1 else end0
