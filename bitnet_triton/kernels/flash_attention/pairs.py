"""The matrix that a mask describes, by brute force: what the kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.description import MaskDescription


@dataclass(frozen=True)
class Lengths:
    """How many tokens there are and which of them count.

    Attributes:
        Tq: rows of queries.
        Tk: rows of keys.
        leftpad_k: int32 [B], the first valid key; None: 0.
        seqused_q: int32 [B], one past the last valid query; None: ``Tq``.
        seqused_k: int32 [B], one past the last valid key; None: ``Tk``.
    """

    Tq: int
    Tk: int
    leftpad_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    def positions(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Return the positions of queries [B Tq] and keys [B Tk], from the first valid key on."""
        given = [t for t in (self.leftpad_k, self.seqused_q, self.seqused_k) if t is not None]
        device = given[0].device if given and device is None else device
        left, used_q, used_k = (
            torch.tensor([[default]], device=device) if t is None else t.to(device)[:, None]
            for t, default in (
                (self.leftpad_k, 0), (self.seqused_q, self.Tq), (self.seqused_k, self.Tk)
            )
        )  # fmt: skip
        queries = torch.arange(self.Tq, device=device) + used_k - used_q - left
        return queries, torch.arange(self.Tk, device=device) - left

    def valid(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Return which queries [B Tq] and keys [B Tk] are no padding."""
        p, j = self.positions(device)
        rows, columns = (
            torch.arange(self.Tq, device=p.device),
            torch.arange(self.Tk, device=p.device),
        )
        is_query = torch.ones_like(p, dtype=torch.bool)
        is_key = j >= 0
        if self.leftpad_k is not None:
            is_query = p >= 0
        if self.seqused_q is not None:
            is_query = is_query & (rows < self.seqused_q.to(p.device)[:, None])
        if self.seqused_k is not None:
            is_key = is_key & (columns < self.seqused_k.to(p.device)[:, None])
        return is_query, is_key


def visible_pairs(
    mask: MaskDescription, lengths: Lengths, device: torch.device | str | None
) -> Tensor:
    """Return bool [B Hd Tq Tk]: which pairs ``mask`` shows."""
    p, j = lengths.positions(device)
    is_query, is_key = lengths.valid(device)
    p, j = p[:, None, :, None], j[:, None, None, :]
    tokens, start = mask.global_tokens, mask.dense_from

    seen = _window(mask, p, j) & _pattern(mask, p, j) | (j < mask.sinks)
    if isinstance(tokens, Tensor):
        keys, queries = _global_rows(tokens.to(p.device), lengths, p)
        seen = seen | keys | queries
    elif tokens is not None:
        chosen = torch.tensor(tokens, device=p.device, dtype=torch.long)
        seen = seen | torch.isin(j, chosen) | torch.isin(p, chosen)
    if start is not None:
        first = start.to(p.device).view(-1, 1, 1, 1) if isinstance(start, Tensor) else start
        seen = seen | (p >= first)
    if mask.causal:
        seen = seen & (j <= p)
    return seen & is_query[:, None, :, None] & is_key[:, None, None, :]


def _global_rows(tokens: Tensor, lengths: Lengths, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return which keys [B 1 1 Tk] and queries [B 1 Tq 1] are among bool ``tokens`` [B Tk]."""
    tokens = tokens.view(-1, lengths.Tk)
    left = lengths.leftpad_k
    index = p[:, 0, :, 0] + (0 if left is None else left.to(p.device)[:, None])
    B = max(tokens.shape[0], index.shape[0])
    tokens, index = tokens.expand(B, -1), index.expand(B, -1)
    rows = tokens.gather(1, index.clamp(0, lengths.Tk - 1))
    return tokens[:, None, None, :], (rows & (index >= 0))[:, None, :, None]


def _window(mask: MaskDescription, p: Tensor, j: Tensor) -> Tensor:
    d = torch.tensor(mask.dilations, device=p.device).view(1, -1, 1, 1)
    offset = p - j
    seen = offset % d == 0
    if mask.window is not None:
        seen = seen & (offset < mask.window * d)
    if mask.window_right is not None:
        seen = seen & (offset >= -mask.window_right * d)
    return seen


def _pattern(mask: MaskDescription, p: Tensor, j: Tensor) -> Tensor:
    b = mask.block
    if b is None:
        return torch.ones_like(p - j, dtype=torch.bool)
    if mask.pattern == "strided":
        return ((p - j).abs() < b) | ((p - j) % b == 0)
    same = p.div(b, rounding_mode="floor") == j.div(b, rounding_mode="floor")
    return same | (j % b >= b - mask.summary) if mask.pattern == "fixed" else same
