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

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.description import MaskDescription

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

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps of all heads, each once."""
        return tuple({step for step, *_ in self.heads})

    @functools.cached_property
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


def bands_of(mask: MaskDescription) -> tuple[Band, ...]:
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
