"""How a mask is computed: a few bands of it, one launch each, beside lists of tokens.

In a band every query sees one interval of keys, once both are numbered suitably (``tiles.py``):

- no pattern, and "local": one band in classes of positions equal modulo the dilation;
- "strided": the near keys, then the far ones in classes modulo lcm(block, dilation);
- "fixed": the own block, then the summary keys of earlier blocks, and of later ones.

Keys that everybody sees (sinks, global tokens) are left out of all bands and read from a list; rows
that see everything (global tokens, ``dense_from``) are left out and get a launch of their own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bitnet_triton.kernels.flash_attention.arguments import Call
    from bitnet_triton.kernels.flash_attention.mask import Mask

CLASS, BEFORE, AFTER = 0, 1, 2  # how keys are numbered; the same in tiles.py
OPEN = 2**30  # an interval without an end


@dataclass(frozen=True)
class Band:
    """A part of a mask in which a row sees one interval of keys.

    Attributes:
        heads: for each query head, or for all, (step, left, right, dilation): rows and keys of a
            class stand ``step`` apart, and row R sees the keys R - left to R + right of its class;
            for summary keys left and right count positions, and p - j is a multiple of the
            dilation.
        kind: CLASS; BEFORE or AFTER for summary keys.
        block: the interval ends with the row's block; None: does not.
        summary: summary keys of a block.
    """

    heads: tuple[tuple[int, int, int, int], ...]
    kind: int = CLASS
    block: int | None = None
    summary: int | None = None

    @property
    def is_dilated(self) -> bool:
        """Whether any head skips keys."""
        return any(step > 1 or dilation > 1 for step, _, _, dilation in self.heads)


def dense_band(causal: bool) -> Band:
    """Return the band of rows that see every key, save for causality."""
    return Band(((1, OPEN, 0 if causal else OPEN, 1),))


@functools.lru_cache(maxsize=256)
def bands(
    causal: bool, window: int | None, window_right: int | None, dilations: tuple[int, ...],
    pattern: str | None, block: int | None, summary: int,
) -> tuple[Band, ...]:  # fmt: skip
    """Split what a mask shows beside lists of tokens into bands that share no pair."""
    left = OPEN if window is None else window - 1
    right = 0 if causal else OPEN if window_right is None else window_right
    if pattern == "strided":
        assert block is not None
        return _strided(left, right, dilations, block)
    if pattern is None:
        return (Band(tuple((d, left, right, d) for d in dilations)),)
    own = Band(tuple((d, left, right, d) for d in dilations), block=block)
    if pattern == "local":
        return (own,)
    heads = tuple((1, min(left * d, OPEN), min(right * d, OPEN), d) for d in dilations)
    kinds = (BEFORE,) if causal else (BEFORE, AFTER)
    return (own, *(Band(heads, kind, block, summary) for kind in kinds))


def _strided(left: int, right: int, dilations: tuple[int, ...], block: int) -> tuple[Band, ...]:
    near, before, after = [], [], []
    for d in dilations:
        reach = (block - 1) // d
        near.append((d, min(left, reach), min(right, reach), d))
        step = math.lcm(block, d)
        before.append((step, min(left * d, OPEN) // step, -1, step))
        after.append((step, -1, min(right * d, OPEN) // step, step))
    far = [before] if right == 0 else [before, after]
    return (Band(tuple(near)), *(Band(tuple(heads)) for heads in far))


def bands_of(mask: Mask) -> tuple[Band, ...]:
    """Return the bands of a mask."""
    return bands(
        mask.causal, mask.window, mask.window_right, mask.dilations,
        mask.pattern, mask.block, mask.summary,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def heads_table(band: Band, H: int, device: torch.device) -> Tensor:
    """Return the heads of a band as int32 [H 4]; made once, because GPUs wait for such copies."""
    heads = band.heads * H if len(band.heads) == 1 else band.heads
    return torch.tensor(heads, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class TokenList:
    """Chosen tokens of every sequence.

    Attributes:
        tokens: int32 [N], their numbers in their sequence, in order, one sequence after the other.
        starts: int32 [B + 1], where a sequence starts in ``tokens``.
        flags: uint8 [rows], 1 for those that are listed; row by row, padding counted.
    """

    tokens: Tensor
    starts: Tensor
    flags: Tensor


@dataclass(frozen=True)
class Plan:
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


def plan_call(q: Tensor, k: Tensor, call: Call) -> Plan:
    """Prepare a call: its bands, its lengths and its lists; nothing waits for the device."""
    mask, packed = call.mask, call.cu_seqlens_q is not None
    given = (call.leftpad_k, call.seqused_q, call.seqused_k)
    lengths = None
    if packed or any(t is not None for t in given):
        lengths = _lengths(q, k, call)
    keys = rows = None
    if mask.sinks or mask.global_tokens is not None:
        keys = _key_list(q, k, call, lengths)
    if mask.dense_from is not None or mask.global_tokens is not None:
        rows = _row_list(q, k, call, lengths)
    return Plan(
        bands_of(mask), lengths, packed, keys, rows,
        flagged=mask.global_tokens is not None,
        zeroed=any(t is not None for t in given),
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
    return TokenList(tokens, starts.int(), flags.to(torch.uint8))


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
