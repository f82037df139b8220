"""Tokens: what a call of a model says about its tokens, in a few numbers instead of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from bitnet_triton.kernels import Mask

CAUSAL = Mask()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the queries of a call stand and which tokens are padding; the same for all layers.

    A column is a place in the whole sequence, padding and tokens in the cache included. Layers may
    hold fewer keys than there are columns, if they hold the latest ones, or the first and the
    latest ones.

    Attributes:
        offset: columns before the first query: those that a cache has seen. A static cache counts
            them in a tensor.
        leftpad: int32 [B], the first column that is no padding; None: the first one.
        used_q: int32 [B], how many queries stand before the padding to the right; None: all.
        causal: whether a query sees no key behind its own place.
        window: keys that a query sees in a sliding layer of transformers; None: all.
        cu_seqlens: int32 [S + 1], where the sequences start that are packed into the rows, one row
            after the other; None: one sequence a row.
        matrix: [B 1 Tq Tk], bool or added to the scores, where nothing else describes the mask.
    """

    # transformers asks masks for these: four dimensions are what it takes for a finished mask, and
    # it hands the length on to our own mask function, which has no use for it
    ndim: ClassVar[int] = 4
    shape: ClassVar[tuple[int, ...]] = (1, 1, 1, 1)

    offset: int | Tensor = 0
    leftpad: Tensor | None = None
    used_q: Tensor | None = None
    causal: bool = True
    window: int | None = None
    cu_seqlens: Tensor | None = None
    matrix: Tensor | None = None

    @property
    def mask(self) -> Mask:
        """What transformers wants seen, without the padding."""
        if self.causal and self.window is None:
            return CAUSAL
        return Mask(causal=self.causal, window=self.window)

    @property
    def starts_a_text(self) -> bool:
        """Whether no column stands before the first query."""
        return isinstance(self.offset, int) and self.offset == 0

    def packed_by(self, position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tokens:
        """Return what is seen where texts start again in a row, as positions [B Tq] or [1 Tq] say.

        Args:
            position_ids: of queries q [B H Tq D], which are all there is if k is as long.
            q: [B H Tq D].
            k: [B Hk Tk D].

        transformers tells its mask functions of packed texts only where there is no cache, and no
        mask beside positions. All layers of a call have these tokens: values are looked at once.
        """
        (B, _, Tq, _), Tk = q.shape, k.shape[2]
        if position_ids is None or position_ids.ndim != 2 or not 1 < Tq == Tk:
            return self
        others = (self.leftpad, self.used_q, self.cu_seqlens, self.matrix)
        is_plain = self.starts_a_text and self.causal and all(other is None for other in others)
        if not is_plain or torch.compiler.is_compiling():
            return self
        if "_packed" not in self.__dict__:
            packed = self
            if find_texts(position_ids)[0]:
                step = position_ids.expand(B, Tq).diff(dim=-1)
                packed = replace(self, cu_seqlens=starts_of(step != 1))
            object.__setattr__(self, "_packed", packed)
        return cast("Tokens", self.__dict__["_packed"])

    def stand_at(self, position_ids: Tensor) -> bool:
        """Tell whether positions [B or 1, Tq] are the columns, counted from the first real token.

        All layers of a call have these tokens: values are looked at once.
        """
        if "_stand" not in self.__dict__:
            column = self.offset + torch.arange(position_ids.shape[1], device=position_ids.device)
            place = column if self.leftpad is None else column - self.leftpad[:, None]
            is_right = (position_ids == place) | (place < 0)
            if self.used_q is not None:
                is_right = is_right | (column - self.offset >= self.used_q[:, None])
            object.__setattr__(self, "_stand", bool(is_right.all()))
        return cast("bool", self.__dict__["_stand"])

    def contiguous(self) -> Tokens:
        """Return itself: transformers asks it of the masks that ``generate`` prepares."""
        return self

    def dropped(self, Tq: int, Tk: int) -> int:
        """Return how many columns are missing in a layer that holds ``Tk`` keys."""
        # a cache that counts in a tensor drops nothing
        return max(self.offset + Tq - Tk, 0) if isinstance(self.offset, int) else 0

    def lengths(self, q: Tensor, k: Tensor) -> dict[str, Tensor | None]:
        """Return what ``flash_attention`` wants to know of q [B Tq H D] and k [B Tk Hk D]."""
        (B, Tq), Tk = q.shape[:2], k.shape[1]
        left, used_k = self.leftpad, self._used_k(B, Tq, Tk, k.device)
        if left is not None:
            left = (left - self.dropped(Tq, Tk)).clamp_min(0)
        return {"leftpad_k": left, "seqused_q": self.used_q, "seqused_k": used_k}

    def _used_k(self, B: int, Tq: int, Tk: int, device: torch.device) -> Tensor | None:
        length = self.offset + Tq
        if isinstance(length, Tensor):
            used = length.to(device=device, dtype=torch.int32).expand(B)
        elif length >= Tk and self.used_q is None:
            return None
        else:
            used = torch.full((B,), min(length, Tk), dtype=torch.int32, device=device)
        return (used if self.used_q is None else used - (Tq - self.used_q)).contiguous()


def padding_of(attention_mask: Tensor, Tq: int) -> tuple[Tensor | None, Tensor | None] | None:
    """Describe a mask of padding [B T], whose last columns belong to ``Tq`` queries.

    Looks at the values: synchronises with the device once.

    Returns:
        ``leftpad`` and ``used_q`` as in ``Tokens``; None where no such numbers describe the mask,
        because tokens stand on both sides of padding.
    """
    T = attention_mask.shape[1]
    is_token = attention_mask.bool()
    seen = is_token.cumsum(-1)
    left = (seen == 0).sum(-1)
    right = (is_token.flip(-1).cumsum(-1) == 0).sum(-1)
    # an empty row is padding to the left as a whole
    right = torch.where(left == T, 0, right)
    has_hole = (seen[:, -1] != T - left - right) | (right > Tq)
    flags = torch.stack([has_hole.any(), (left > 0).any(), (right > 0).any()]).tolist()
    if flags[0]:
        return None
    return (
        left.int() if flags[1] else None,
        (Tq - right).int() if flags[2] else None,
    )


def find_texts(position_ids: Tensor, is_token: Tensor | None = None) -> list[bool]:
    """Tell whether texts start inside of rows, and whether padding stands in front of tokens.

    Looks at the values: synchronises with the device once.

    Args:
        position_ids: [B T].
        is_token: bool [B T], what is no padding; None: everything.
    """
    step = position_ids.diff(dim=-1)
    starts = (position_ids[:, 1:] == 0) | (step < 0)
    if is_token is None:
        both, in_front = torch.ones_like(starts), torch.zeros_like(starts)
    else:
        is_token = is_token.to(position_ids.device)
        both, in_front = is_token[:, 1:] & is_token[:, :-1], is_token[:, 1:] & ~is_token[:, :-1]
    # positions that neither go on nor start again are no texts in a row, but somebody's own
    is_packed = (starts & both).any() & ((step == 1) | starts | ~both).all()
    return torch.stack([is_packed, in_front.any()]).tolist()


def starts_of(is_other: Tensor) -> Tensor:
    """Return where texts start in rows of T tokens, and how many tokens there are, int32 [S + 1].

    Args:
        is_other: bool [B T - 1], which tokens belong to another text than the one before.
    """
    is_first = torch.cat([torch.ones_like(is_other[:, :1]), is_other], dim=1)
    starts = is_first.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([is_first.numel()])]).int()
