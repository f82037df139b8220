"""What modes share whose tokens read near tokens of the same bucket, whoever makes the buckets."""

from __future__ import annotations

import functools
import logging
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.cache import BucketsLayer, Memory
from bitnet_triton.cache.key_values import LEFTPAD, USED
from bitnet_triton.kernels import bucket_attention
from bitnet_triton.kernels.lsh_attention.arguments import Directions
from bitnet_triton.kernels.lsh_attention.step import bucket_attention_last, seen_by_last

logger = logging.getLogger("bitnet_triton")


class BucketMode(Mode):
    """A mode of shared queries and keys: what ``k_proj`` makes of a token is both.

    So a cache holds what it always holds, and the bucket of each key beside it. Subclasses are
    frozen dataclasses of their settings, with ``buckets_of``, ``directions``, ``hash_rounds``
    and ``window``.
    """

    window: int

    @property
    def is_chunked(self) -> bool:
        """Whether chunks show tokens to each other, as published, and no window."""
        return False

    def buckets_of(self, qk: Tensor, context: AttentionContext) -> Tensor:
        """Return int32 [B T H R], the buckets of qk [B T H D] in each round."""
        raise NotImplementedError

    def directions(self, D: int, device: torch.device, layer: StepLayer) -> Directions:
        """Return what ``buckets_of`` chooses from in a layer, for heads of D."""
        raise NotImplementedError

    @property
    def brings_memory(self) -> bool:
        """A memory of its own saves work, and any other that holds all keys serves as well."""
        return False

    def memory(self, other: Mode) -> Memory:
        """Return a memory that keeps buckets, unless the other mode needs one of its own."""
        if self.is_chunked or other.brings_memory:
            return super().memory(other)
        return BucketsLayer(self.hash_rounds, self)

    @property
    def hash_rounds(self) -> int:
        """How many buckets a token has in a head."""
        raise NotImplementedError

    def remember(self, k: Tensor, context: AttentionContext) -> None:
        """Hash what the mode of the other phase answers, where a memory keeps buckets."""
        if self._owns(context.memory):
            self._numbers(k, context)

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
        numbers = self._numbers(k, context)
        wants_gradient = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if Tq == 1 and k.shape[1] > 1 and not wants_gradient:
            left = None if tokens.leftpad is None else tokens.leftpad.int()
            return bucket_attention_last(
                k, v, numbers.permute(0, 2, 3, 1), window=self.window, scale=context.scale,
                leftpad=left,
            )  # fmt: skip
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
        seen = seen_by_last(self._numbers(k, context), self.window, context.tokens.leftpad)
        rows = (seen.sum(-1) - (seen.sum(-1) > 1).int()).float().mean().item()
        left = context.tokens.leftpad
        return Reads(rows, k.shape[1] - (0 if left is None else left.float().mean().item()))

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token and its buckets, and read near tokens of these."""
        if self.is_chunked:
            return "published chunks go without a cache"
        if not self._owns(memory):
            return "its cache keeps no buckets of this mode"
        if not memory.is_numbered:
            return "its cache lacks the buckets of some tokens"
        keys = memory.stores[0]
        directions = self.directions(keys.shape[-1], keys.device, layer)

        def hash_step(keys: Tensor, numbers: Tensor, slots: Tensor) -> None:
            # Triton is imported on first use, here and below
            from bitnet_triton.kernels.lsh_attention.decode import launch_hash_step

            launch_hash_step(keys, directions, numbers, slots)

        memory.follow(hash_step)

        def run(step: StepTensors) -> Tensor:
            from bitnet_triton.kernels.lsh_attention.decode import launch_bucket_step

            memory.write(step.heads, step.cos, step.sin, step.places)
            k, v = (store.transpose(1, 2) for store in memory.stores)
            assert memory.number_store is not None
            return launch_bucket_step(
                k, v, memory.number_store, window=self.window, scale=layer.scale,
                leftpad=step.places[LEFTPAD], used=step.places[USED],
            )  # fmt: skip

        return run

    def _owns(self, memory: object) -> TypeGuard[BucketsLayer]:
        """Tell whether a memory keeps the buckets of this mode."""
        return isinstance(memory, BucketsLayer) and memory.owner == self

    def _numbers(self, k: Tensor, context: AttentionContext) -> Tensor:
        """Return int32 [B T H R], the buckets of k [B T H D]: of the memory, or made anew."""
        memory = context.memory
        if self._owns(memory):
            return memory.take_in(lambda new: self.buckets_of(new, context)).permute(0, 3, 1, 2)
        return self.buckets_of(k, context)

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
