"""What the attention kernels of a call take, beside their own tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.bands import Band
from bitnet_triton.kernels.flash_attention.prepare import Prepared, TokenList
from bitnet_triton.runtime import cdiv


class SinkQuery(NamedTuple):
    """A query as the first tokens meet it once they have left its window: at another position.

    Attributes:
        heads: [B 1 H or more D], the heads of the query first, not rotated.
        cos: [P D], the rotary embedding of all positions.
        sin: likewise.
        last: the position that the query has for them, or its own where that is smaller.
    """

    heads: Tensor
    cos: Tensor
    sin: Tensor
    last: int


def strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of sequences (0 where packed), rows and heads."""
    return (0, *t.stride()[:2]) if t.ndim == 3 else t.stride()[:3]  # type: ignore[return-value]


def grid_tiles(t: Tensor, block: int, band: Band, batch: int) -> int:
    """Return the programs that all tiles of rows of ``t`` need, without asking for lengths."""
    if t.ndim == 4:
        return max([step * cdiv(cdiv(t.shape[1], step), block) for step in band.steps])
    # each class of each sequence may end in a tile of its own
    return cdiv(t.shape[0], block) + batch * max(band.steps)


def common(
    q: Tensor, k: Tensor, v: Tensor, call: Call, prepared: Prepared, band: Band
) -> dict[str, Any]:
    """Return the keyword arguments that all kernels take."""
    H, Hk = q.shape[-2], k.shape[-2]
    packed = prepared.packed
    scale_log2, softcap_log2 = score_factors(call.scale, call.softcap)
    return {
        "B": prepared.lengths.shape[0] if packed and prepared.lengths is not None else None,
        "Tq": q.shape[-3], "Tk": k.shape[-3],
        "block": band.block, "summary": band.summary,
        "scale_log2": scale_log2, "softcap_log2": softcap_log2,
        "GROUP": H // Hk, "D": q.shape[-1], "DV": v.shape[-1],
        "KIND": band.kind, "DILATED": band.is_dilated, "CAUSAL": call.mask.causal,
    }  # fmt: skip


def tokens_of(listed: TokenList | None) -> Tensor | None:
    """Return a list of tokens as kernels take it."""
    return None if listed is None else listed.tokens


def key_flags(prepared: Prepared) -> Tensor | None:
    """Return the flags of keys to leave out; the first ``sinks`` are left out by their number."""
    return prepared.keys.flags if prepared.keys is not None and prepared.flagged else None


def row_flags(prepared: Prepared, dense: bool) -> Tensor | None:
    """Return the flags of rows to leave out, where they are not the ones to compute."""
    return prepared.rows.flags if prepared.rows is not None and not dense else None


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return ``scale_log2`` and ``softcap_log2`` as ``common.attention.score_tile`` takes them."""
    if softcap is None:
        return scale * math.log2(math.e), None
    return scale / softcap, softcap * math.log2(math.e)
