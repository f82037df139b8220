"""Mask: which keys a query sees, as a description and never as a matrix in the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.description import MaskDescription
from bitnet_triton.kernels.flash_attention.pairs import Lengths, visible_pairs
from bitnet_triton.kernels.flash_attention.picture import draw_mask, plot_mask
from bitnet_triton.kernels.flash_attention.work import Work, count_work


@dataclass(frozen=True, eq=False)
class Mask(MaskDescription):
    """Which keys each query sees.

    With p the position of the query and j that of the key, both counted from the first valid key,
    a pair is visible where

        causal(p, j) and ((window(p, j) and pattern(p, j)) or j < sinks
                          or global(j) or global(p) or p >= dense_from)

    Queries are aligned to the bottom right: the last query stands at the last key. Every field goes
    with every other one, with the exceptions under Raises.

    Attributes:
        causal: a query sees no key behind its own position.
        window: keys to the left that a query sees, itself included; None: all of them.
        window_right: keys to the right, itself excluded, where ``causal`` is False; None: all.
        sinks: the first keys stay visible to every query that causality lets see them.
        dilation: the keys of a window stand so far apart; one number, or one for each query head.
        global_tokens: tokens that see everything and are seen by everything (Longformer,
            arXiv:2004.05150, section 3.1): positions for all rows of a batch, or bool [B Tk] (by
            index of the key, padding counted; [sum Tk] for packed sequences).
        dense_from: queries at this position or later see every key (SWAA, arXiv:2512.10411); a
            number, or int32 [B], one for each row.
        pattern: "local": keys of the query's own block; "strided": the ``block`` latest keys and
            then every ``block``-th; "fixed": the query's own block, and the last ``summary`` keys
            of every block (arXiv:1904.10509, section 4.3). None: no further restriction.
        block: length of a pattern's blocks.
        summary: keys at the end of each block that "fixed" shows to everybody.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a number is out of range; ``window_right`` with ``causal``; ``pattern`` without
            ``block`` or the other way round; ``summary`` without the pattern "fixed".
    """

    def visible(
        self,
        Tq: int,
        Tk: int | None = None,
        *,
        leftpad_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the whole matrix: for tests and pictures.

        Args:
            Tq: number of queries.
            Tk: number of keys. Default: ``Tq``.
            leftpad_k: int32 [B], as for ``flash_attention``; so are the next two.
            seqused_q: int32 [B].
            seqused_k: int32 [B].
            device: of the result. Default: that of the tensors, else the CPU.

        Returns:
            bool [B Hd Tq Tk], True where the query sees the key; B is 1 unless a tensor says
            otherwise, Hd is 1 or the number of dilations.
        """
        lengths = Lengths(Tq, Tq if Tk is None else Tk, leftpad_k, seqused_q, seqused_k)
        return self.visible_among(lengths, device)

    def visible_among(self, lengths: Lengths, device: torch.device | str | None = None) -> Tensor:
        """Return the same as ``visible``, for lengths that stand together."""
        return visible_pairs(self, lengths, device)

    def work(
        self, Tq: int, Tk: int | None = None, *, heads: int = 1, block_m: int = 128,
        block_n: int = 128,
    ) -> Work:  # fmt: skip
        """Count the tiles of keys that the forward kernel loads, and those of dense attention.

        Args:
            Tq: number of queries.
            Tk: number of keys. Default: ``Tq``.
            heads: number of query heads.
            block_m: queries of a tile.
            block_n: keys of a tile.

        Raises:
            TypeError: a field is a tensor, whose values the count would depend on.
        """
        return count_work(self, Tq, Tq if Tk is None else Tk, heads, block_m, block_n)

    def explain(self, Tq: int, Tk: int | None = None, *, head: int = 0, width: int = 64) -> str:
        """Draw the mask as text: a row a query, a full block where it sees a key.

        Args:
            Tq: number of queries.
            Tk: number of keys. Default: ``Tq``.
            head: which query head, where dilations differ.
            width: most characters and lines; a larger matrix is drawn by tiles of keys and queries,
                in shades of how much of a tile is visible.
        """
        return draw_mask(self, self.visible(Tq, Tk)[0], head, width)

    def plot(self, Tq: int, Tk: int | None = None, *, head: int = 0) -> Any:
        """Draw the mask as a matplotlib figure, which the extra ``bench`` installs.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_mask(self, self.visible(Tq, Tk)[0], head)
