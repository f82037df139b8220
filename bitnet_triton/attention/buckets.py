"""What modes share whose tokens read near tokens of the same bucket, whoever makes the buckets."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served
from bitnet_triton.attention.mode import Mode, Reads, StepLayer
from bitnet_triton.cache import Memory
from bitnet_triton.kernels import bucket_attention
from bitnet_triton.kernels.lsh_attention.step import bucket_attention_last, seen_by_last

logger = logging.getLogger("bitnet_triton")


class BucketMode(Mode):
    """A mode of shared queries and keys: what ``k_proj`` makes of a token is both.

    So a cache holds what it always holds. Subclasses are frozen dataclasses of their settings,
    with ``buckets_of`` and ``window``.
    """

    window: int

    @property
    def is_chunked(self) -> bool:
        """Whether chunks show tokens to each other, as published, and no window."""
        return False

    def buckets_of(self, qk: Tensor, context: AttentionContext) -> Tensor:
        """Return int32 [B T H R], the buckets of qk [B T H D] in each round."""
        raise NotImplementedError

    def check_heads(self, config: Any) -> None:
        """Raise unless there are as many heads of keys as of queries; tell what is not used."""
        H, Hk = config.num_attention_heads, config.num_key_value_heads
        if Hk != H:
            raise ValueError(
                f"`attention`: {self.name!r} shares queries and keys: expected as many heads of "
                f"keys as of queries, got {Hk} and {H}"
            )
        _tell(self.name)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D], which is not read, and k, v [B Tk H D] to [B Tq H D]."""
        k, v = self._held(q, k, v, context)
        Tq, tokens = q.shape[1], context.tokens
        numbers = self.buckets_of(k, context)
        wants_gradient = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if Tq == 1 and k.shape[1] > 1 and not wants_gradient:
            seen = seen_by_last(numbers, self.window, tokens.leftpad)
            return bucket_attention_last(k, v, seen, scale=context.scale)
        pattern = "chunk" if self.is_chunked else "window"
        settings: Any = {"window": self.window, "pattern": pattern, "scale": context.scale}
        if tokens.cu_seqlens is not None:
            out = bucket_attention(
                k.flatten(0, 1), v.flatten(0, 1), numbers.flatten(0, 1),
                cu_seqlens=tokens.cu_seqlens, **settings,
            )  # fmt: skip
            return out.unflatten(0, q.shape[:2])
        return bucket_attention(k, v, numbers, leftpad=tokens.leftpad, **settings)[:, -Tq:]

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads | None:
        """Count the tokens that the last one sees; of all of them it looks at the buckets."""
        if self.is_chunked:
            return None
        k, _ = self._held(q, k, v, context)
        seen = seen_by_last(self.buckets_of(k, context), self.window, context.tokens.leftpad)
        rows = (seen.sum(-1) - (seen.sum(-1) > 1).int()).float().mean().item()
        left = context.tokens.leftpad
        return Reads(rows, k.shape[1] - (0 if left is None else left.float().mean().item()))

    def step(self, memory: Memory, layer: StepLayer) -> str:
        """Say that there is none."""
        return "it looks through the buckets of all tokens, which no recorded step does yet"

    def _held(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, or raise what the mode cannot do."""
        check_served(self, context)
        tokens, Tq = context.tokens, q.shape[1]
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"`attention`: {self.name!r} shares queries and keys: expected as many heads of "
                f"keys as of queries, got {k.shape[2]} and {q.shape[2]}"
            )
        if context.softcap is not None or context.s_aux is not None:
            raise ValueError(f"`attention`: {self.name!r} goes without `softcap` and `s_aux`")
        if tokens.cu_seqlens is not None:
            if k.shape[1] != Tq:
                raise ValueError("`position_ids`: packed sequences go without a cache")
            return k, v
        used = int(tokens.offset) + Tq
        if self.is_chunked and (used != Tq or tokens.used_q is not None):
            raise ValueError(
                f"`attention`: {self.name!r} with 'chunk' goes without a cache and without padding "
                "on the right: what a token reads depends on later ones; expected 'window'"
            )
        return k[:, :used], v[:, :used]  # behind it a static cache has nothing


@functools.cache
def _tell(name: str) -> None:
    logger.warning(
        "attention %r shares queries and keys: k_proj makes both, and what q_proj makes is not "
        "read; a model that was trained with both has to be trained anew",
        name,
    )
