"""What the launches of one call share: bands of the mask, valid rows, and lists of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.bands import Band, bands_of


@dataclass(frozen=True)
class TokenList:
    """Chosen tokens of every sequence.

    Attributes:
        tokens: int32 [B + 1 + N], where each sequence starts and how many tokens there are; then
            their numbers in their sequence, in order, one sequence after the other.
        flags: uint8 [rows], 1 for those that are listed; row by row, padding counted.
    """

    tokens: Tensor
    flags: Tensor


@dataclass(frozen=True)
class Prepared:
    """Everything that the launchers of a call share.

    Attributes:
        bands: of the mask.
        lengths: int32 [B 4], first row and number of the valid queries, and of the valid keys;
            None: all of them.
        packed: whether sequences stand behind one another.
        keys: those that everybody sees, or None.
        rows: those that see everything, or None.
        flagged: whether ``keys`` are more than the first ``sinks``.
        zeroed: whether some rows of the results belong to no tile.
    """

    bands: tuple[Band, ...]
    lengths: Tensor | None
    packed: bool
    keys: TokenList | None
    rows: TokenList | None
    flagged: bool
    zeroed: bool


def prepare_call(q: Tensor, k: Tensor, call: Call) -> Prepared:
    """Prepare a call: its bands, its lengths and its lists; nothing waits for the device."""
    mask, packed = call.mask, call.cu_seqlens_q is not None
    given = not (call.leftpad_k is call.seqused_q is call.seqused_k is None)
    lengths = _lengths(q, k, call) if packed or given else None
    keys = rows = None
    if mask.sinks or mask.global_tokens is not None:
        keys = _key_list(q, k, call, lengths)
    if mask.dense_from is not None or mask.global_tokens is not None:
        rows = _row_list(q, k, call, lengths)
    return Prepared(
        bands_of(mask), lengths, packed, keys, rows,
        flagged=mask.global_tokens is not None,
        zeroed=given,
    )  # fmt: skip


def _lengths(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Return the valid rows of each sequence, as counted from its first row."""
    cu_q, cu_k = call.cu_seqlens_q, call.cu_seqlens_k
    if cu_q is not None and cu_k is not None:
        start_q, start_k = cu_q[:-1], cu_k[:-1]
        len_q, len_k = cu_q.diff(), cu_k.diff()
    else:
        start_q = start_k = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        len_q, len_k = start_q + q.shape[1], start_k + k.shape[1]
    len_q = len_q if call.seqused_q is None else torch.minimum(len_q, call.seqused_q)
    len_k = len_k if call.seqused_k is None else torch.minimum(len_k, call.seqused_k)
    if call.leftpad_k is not None:
        left = torch.minimum(call.leftpad_k, len_k)
        start_k, len_k = start_k + left, len_k - left
        # queries that stand before the first valid key are padding
        padded = (len_q - len_k).clamp(min=0)
        start_q, len_q = start_q + padded, len_q - padded
    return torch.stack((start_q, len_q, start_k, len_k), dim=1).contiguous()


def _positions(
    t: Tensor, lengths: Tensor | None, cu: Tensor | None, column: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row of ``t`` its sequence, its number among the valid rows, and their count.

    Each is [rows], flat; a number outside of 0 .. count is no valid row.
    """
    device = t.device
    if cu is not None:
        assert lengths is not None
        index = torch.arange(t.shape[0], device=device)
        b = torch.searchsorted(cu[1:].long(), index, right=True).clamp(max=cu.numel() - 2)
    else:
        B, T = t.shape[:2]
        index = torch.arange(T, device=device).repeat(B)
        b = torch.arange(B, device=device).repeat_interleave(T)
        if lengths is None:
            return b, index, torch.full_like(index, T)
    return b, index - lengths[b, column], lengths[b, column + 1].long()


def _compact(flags: Tensor, numbers: Tensor, T: Tensor, cu: Tensor | None) -> TokenList:
    """List the ``numbers`` of flagged rows of ``T``, sequence by sequence."""
    if cu is None:
        cu = torch.arange(T.shape[0] + 1, device=T.device) * T.shape[1]
    ranks = flags.cumsum(0)
    # the rows that are not chosen write to a place behind the list
    places = torch.where(flags, ranks - 1, flags.numel())
    tokens = torch.zeros(flags.numel() + 1, dtype=torch.int32, device=T.device)
    tokens.scatter_(0, places, numbers.int())
    starts = torch.cat((ranks.new_zeros(1), ranks))[cu.long()]
    return TokenList(torch.cat((starts.int(), tokens)), flags.to(torch.uint8))


def _key_list(q: Tensor, k: Tensor, call: Call, lengths: Tensor | None) -> TokenList:
    mask = call.mask
    _, j, count = _positions(k, lengths, call.cu_seqlens_k, 2)
    chosen = j < mask.sinks
    if isinstance(mask.global_tokens, Tensor):
        chosen = chosen | mask.global_tokens.reshape(-1)
    elif mask.global_tokens is not None:
        chosen = chosen | torch.isin(j, torch.tensor(mask.global_tokens, device=j.device))
    return _compact(chosen & (j >= 0) & (j < count), j, k, call.cu_seqlens_k)


def _row_list(q: Tensor, k: Tensor, call: Call, lengths: Tensor | None) -> TokenList:
    mask = call.mask
    b, i, count = _positions(q, lengths, call.cu_seqlens_q, 0)
    if lengths is None:
        first_k, p = torch.zeros_like(i), i + k.shape[1] - q.shape[1]
    else:
        first_k, p = lengths[b, 2].long(), i + lengths[b, 3] - count
    chosen = torch.zeros_like(i, dtype=torch.bool)
    if isinstance(mask.dense_from, Tensor):
        chosen = p >= mask.dense_from[b]
    elif mask.dense_from is not None:
        chosen = p >= mask.dense_from
    if isinstance(mask.global_tokens, Tensor):
        tokens = mask.global_tokens.reshape(-1)
        row = first_k + p + (0 if call.cu_seqlens_q is not None else b * k.shape[1])
        own = tokens[row.clamp(0, tokens.numel() - 1)]
        chosen = chosen | (own & (p >= 0))
    elif mask.global_tokens is not None:
        chosen = chosen | torch.isin(p, torch.tensor(mask.global_tokens, device=p.device))
    return _compact(chosen & (i >= 0) & (i < count), i, q, call.cu_seqlens_q)
