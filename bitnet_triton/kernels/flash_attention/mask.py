"""Mask: which keys a query sees, as a description and never as a matrix in the kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.pairs import Lengths, visible_pairs
from bitnet_triton.kernels.flash_attention.picture import draw_mask, plot_mask
from bitnet_triton.kernels.flash_attention.work import Work, count_work

PATTERNS = ("local", "strided", "fixed")


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query sees.

    With p the position of the query and j that of the key, both counted from the first valid key,
    a pair is visible where

        causal(p, j) and ((window(p, j) and pattern(p, j)) or j < sinks
                          or global(j) or global(p) or p >= dense_from)

    and ``top_k`` and ``threshold`` then choose among what is visible. Queries are aligned to the
    bottom right: the last query stands at the last key. Every field goes with every other one, with
    the exceptions under Raises.

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
        top_k: each row keeps only its largest scores, the earlier key where they are equal.
        threshold: each row keeps the weights of at least this share of its largest one.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a number is out of range; ``window_right`` with ``causal``; ``pattern`` without
            ``block`` or the other way round; ``summary`` without the pattern "fixed".
    """

    causal: bool = True
    window: int | None = None
    window_right: int | None = None
    sinks: int = 0
    dilation: int | tuple[int, ...] = 1
    global_tokens: Tensor | tuple[int, ...] | None = None
    dense_from: int | Tensor | None = None
    pattern: str | None = None
    block: int | None = None
    summary: int = 1
    top_k: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("dilation", "global_tokens"):  # JSON has lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.causal, bool):
            raise TypeError(f"`causal`: expected a bool, got {type(self.causal).__name__}")
        for name, least in (("window", 1), ("window_right", 0), ("block", 1), ("top_k", 1)):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), least)
        _check_number("sinks", self.sinks, 0)
        _check_number("summary", self.summary, 1)
        self._check_tensors()
        self._check_combinations()

    def _check_tensors(self) -> None:
        for step in self.dilations:
            _check_number("dilation", step, 1)
        tokens, start = self.global_tokens, self.dense_from
        if isinstance(tokens, Tensor):
            if tokens.dtype != torch.bool:
                raise TypeError(f"`global_tokens`: expected dtype bool, got {tokens.dtype}")
        elif tokens is not None:
            if not isinstance(tokens, tuple):
                raise TypeError(
                    "`global_tokens`: expected positions or a bool tensor, got "
                    f"{type(tokens).__name__}"
                )
            for position in tokens:
                _check_number("global_tokens", position, 0)
        if isinstance(start, Tensor):
            if start.dtype != torch.int32 or start.ndim != 1:
                raise TypeError(
                    f"`dense_from`: expected int32 [B], got {start.dtype} {list(start.shape)}"
                )
        elif start is not None:
            _check_number("dense_from", start, 0)

    def _check_combinations(self) -> None:
        if self.causal and self.window_right is not None:
            raise ValueError("`window_right`: a causal mask shows no key to the right")
        if self.pattern is not None and self.pattern not in PATTERNS:
            wanted = ", ".join(PATTERNS)
            raise ValueError(f"`pattern`: expected one of {wanted}, got {self.pattern!r}")
        if (self.pattern is None) != (self.block is None):
            raise ValueError(
                f"`block`: goes with a pattern, got block={self.block} and pattern={self.pattern!r}"
            )
        if self.summary != 1 and self.pattern != "fixed":
            raise ValueError("`summary`: goes with the pattern 'fixed'")
        if self.block is not None and self.summary > self.block:
            raise ValueError(f"`summary`: expected at most `block`, got {self.summary}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold`: expected more than 0, up to 1, got {self.threshold}")

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each head, or the one of all."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)

    @property
    def selects(self) -> bool:
        """Whether scores decide what is seen."""
        return self.top_k is not None or self.threshold is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        values = [getattr(self, field.name) for field in fields(self)]
        return hash(tuple([tuple(v.shape) if isinstance(v, Tensor) else v for v in values]))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as data that JSON can hold.

        Raises:
            TypeError: a field is a tensor.
        """
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if not _equal(getattr(self, field.name), field.default)
        }
        for name, value in changed.items():
            if isinstance(value, Tensor):
                raise TypeError(f"`{name}`: a tensor cannot be written as JSON")
        return json.loads(json.dumps(changed))

    def of_row(self, row: int, start: int, end: int) -> Mask:
        """Return the mask of one packed sequence, whose keys are ``start`` to ``end``."""
        changes: dict[str, Tensor] = {}
        if isinstance(self.global_tokens, Tensor):
            changes["global_tokens"] = self.global_tokens[start:end][None]
        if isinstance(self.dense_from, Tensor):
            changes["dense_from"] = self.dense_from[row : row + 1]
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

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
        """Return the whole matrix, without the selection by scores: for tests and pictures.

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


def _check_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}`: expected at least {least}, got {value}")


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    return type(a) is type(b) and a == b
