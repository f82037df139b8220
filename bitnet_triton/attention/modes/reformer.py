"""Reformer: near tokens that random rotations put into the same bucket (arXiv:2001.04451)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.attention.buckets import BucketMode
from bitnet_triton.attention.checks import check_known, check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import StepLayer
from bitnet_triton.kernels import hash_buckets
from bitnet_triton.kernels.lsh_attention.arguments import Directions
from bitnet_triton.kernels.lsh_attention.buckets import bucket_factors, rotation_rows
from bitnet_triton.kernels.lsh_attention.op import PATTERNS


@dataclass(frozen=True)
class Reformer(BucketMode):
    """Queries and keys are one, and a token reads near ones of its bucket in any round.

    Attributes:
        rounds: how many times tokens are hashed; another number may be taken after training.
        buckets: of a round; even, above 128 a multiple of 4.
        window: tokens of its bucket that a token reads in a round, itself included; or tokens of a
            chunk.
        pattern: "window"; or "chunk", the published pattern, which is no causal one in the sense
            that a cache needs, and goes without.
        seed: of the rotations; each layer has others.
    """

    rounds: int = 4
    buckets: int = 32
    window: int = 64
    pattern: str = "window"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("buckets", 2), ("window", 1), ("seed", 0)):
            check_number(name, getattr(self, name), least)
        check_known("'pattern'", self.pattern, PATTERNS)
        try:
            bucket_factors(self.buckets)
        except ValueError as error:
            raise ValueError(f"`attention`: mode {self.name!r}: {error}") from error

    @property
    def is_chunked(self) -> bool:
        """Whether the pattern is the published one."""
        return self.pattern == "chunk"

    def module(self, config: Any) -> None:
        """Bring nothing; refuse a model whose queries share keys."""
        self.check_heads(config)

    @property
    def hash_rounds(self) -> int:
        """As many as rounds."""
        return self.rounds

    def buckets_of(self, qk: Tensor, context: AttentionContext) -> Tensor:
        """Return int32 [B T H R] by rotations of the layer."""
        seed = self._seed(context.layer)
        return hash_buckets(qk, rounds=self.rounds, buckets=self.buckets, seed=seed)

    def directions(self, D: int, device: torch.device, layer: StepLayer) -> Directions:
        """Return the rotations of the layer."""
        seed = self._seed(layer.index)
        rows = rotation_rows(D, self.rounds, self.buckets, seed, device)
        widths = tuple(factor // 2 for factor in bucket_factors(self.buckets))
        return Directions(rows, widths, is_signed=True)

    def _seed(self, layer: int) -> int:
        return self.seed + 1009 * layer
