"""Routing by clusters: near tokens of the same cluster, which k-means finds (arXiv:2003.05997).

The paper lets each centroid attend among its nearest members, which a later token can change. Here
a token has the nearest centroid for a bucket, and reads the latest tokens of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.attention.buckets import BucketMode
from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import StepLayer
from bitnet_triton.kernels.lsh_attention.arguments import Directions


class Centroids(nn.Module):
    """The centroids of each head, which follow normalised keys in training by moving averages."""

    centroids: Tensor

    def __init__(self, heads: int, clusters: int, size: int) -> None:
        super().__init__()
        drawn = torch.randn(heads, clusters, size, generator=torch.Generator().manual_seed(0))
        self.register_buffer("centroids", F.normalize(drawn, dim=-1))

    def nearest(self, qk: Tensor) -> Tensor:
        """Return int32 [B T H], the nearest centroid of each of qk [B T H D]."""
        similar = torch.einsum("bthd,hcd->bthc", qk.float(), self.centroids.float())
        return similar.argmax(-1).int()

    def follow(self, qk: Tensor, numbers: Tensor, decay: float) -> None:
        """Move the centroids that have members towards their mean."""
        k = F.normalize(qk.float(), dim=-1)
        members = F.one_hot(numbers.long(), self.centroids.shape[1]).float()  # [B T H C]
        count = members.sum((0, 1))[..., None]  # [H C 1]
        mean = torch.einsum("bthc,bthd->hcd", members, k) / count.clamp_min(1)
        moved = torch.where(count > 0, decay * self.centroids + (1 - decay) * mean, self.centroids)
        self.centroids.copy_(moved)


@dataclass(frozen=True)
class Routing(BucketMode):
    """Queries and keys are one, and a token reads the latest ones of its cluster.

    Attributes:
        clusters: how many each head has.
        window: tokens of its cluster that a token reads, itself included.
        decay: of the moving average; what a token reads has no gradient.
    """

    clusters: int = 16
    window: int = 64
    decay: float = 0.999

    def __post_init__(self) -> None:
        for name in ("clusters", "window"):
            check_number(name, getattr(self, name), 1)
        if not isinstance(self.decay, (int, float)) or isinstance(self.decay, bool):
            got = type(self.decay).__name__
            raise TypeError(f"`attention`: 'decay': expected a number, got {got}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"`attention`: 'decay': expected 0 up to 1, got {self.decay}")

    @property
    def recompute_objection(self) -> str | None:
        """Its centroids have moved by then, and would move again."""
        return "its centroids follow the tokens of each training call, and choose otherwise then"

    def module(self, config: Any) -> nn.Module:
        """Return the centroids; refuse a model whose queries share keys."""
        self.check_heads(config)
        size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return Centroids(config.num_attention_heads, self.clusters, size)

    @property
    def hash_rounds(self) -> int:
        """One."""
        return 1

    def directions(self, D: int, device: torch.device, layer: StepLayer) -> Directions:
        """Return the centroids, as they are from step to step."""
        centroids = cast("Centroids", layer.module).centroids
        return Directions(centroids, (self.clusters,), is_signed=False)

    def buckets_of(self, qk: Tensor, context: AttentionContext) -> Tensor:
        """Return int32 [B T H 1]; in training the centroids follow the tokens afterwards."""
        module = cast("Centroids", context.module)
        with torch.no_grad():
            qk = qk.detach()
            numbers = module.nearest(qk)
            if module.training and context.memory is None:
                module.follow(qk, numbers, self.decay)
        return numbers[..., None]
