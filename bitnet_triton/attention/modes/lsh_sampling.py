"""Importance sampling by hash tables: MagicPIG (arXiv:2410.16179)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.attention.checks import check_known, check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.attention.sampled import Attend, SamplingMode
from bitnet_triton.cache import Memory, TablesLayer
from bitnet_triton.cache.key_values import LEFTPAD, USED
from bitnet_triton.cache.transfers import Transfers
from bitnet_triton.kernels import HashTables, lsh_sampling_attention

_SHARES = ("own", "union", "proposal")


@dataclass(frozen=True)
class LshSampling(SamplingMode):
    """Keys that collide with the query in two hash tables, each by one over its probability.

    Keys and values of the prompt are hashed when it is over, later ones as they come. Layers that
    are to read everything, as the first ones should, are "full" in the plan.

    Attributes:
        bits: of a code; more of them sample fewer keys.
        tables: how many; more of them sample more keys.
        sinks: first tokens of the text that are read in any case.
        recent: latest ones, the token itself included.
        share: what the heads of a group read: "own", "union" or "proposal", as
            ``lsh_sampling_attention`` has them.
        seed: of the planes; equal seeds give equal tokens.
        memory_device: "cpu": keys, values and tables lie in CPU memory, and samples are read there;
            queries go over, and results come back. None: where the model is.
    """

    bits: int = 10
    tables: int = 150
    sinks: int = 4
    recent: int = 64
    share: str = "own"
    seed: int = 0
    memory_device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("bits", 1), ("tables", 2), ("sinks", 0), ("recent", 1), ("seed", 0)):
            check_number(name, getattr(self, name), least)
        if self.bits > 15:
            raise ValueError(f"`attention`: 'bits': expected at most 15, got {self.bits}")
        check_known("'share'", self.share, _SHARES)
        if self.memory_device not in (None, "cpu"):
            raise ValueError(
                "`attention`: 'memory_device': expected 'cpu', or None for the model's own, "
                f"got {self.memory_device!r}"
            )

    def memory(self, other: Mode) -> Memory:
        """Return a memory with tables.

        Raises:
            ValueError: the mode of the other phase needs another memory, or other tables.
        """
        self.check_other(other)
        return TablesLayer(self.bits, self.tables, self.seed, self.memory_device)

    def attend(self, k: Tensor, v: Tensor, prompt: int, context: AttentionContext) -> Attend | None:
        """Return what samples by the tables of the memory, or by ones that are built for a call."""
        tables, transfers = self._tables(k, prompt, context), self._transfers(k, context)

        def attend(q: Tensor, used: Tensor) -> Tensor:
            device = q.device
            if transfers is not None:
                (q,) = transfers.send(q)
            out, _ = lsh_sampling_attention(
                q, k, v, tables, sinks=self.sinks, recent=self.recent, share=self.share,
                scale=context.scale, used=used,
            )  # fmt: skip
            return out if transfers is None else transfers.fetch(out, device=device)[0]

        return attend

    def count(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: int, context: AttentionContext
    ) -> Reads:
        """Count the rows that a query samples or reads in any case, and what it looks up."""
        tables, transfers = self._tables(k, prompt, context), self._transfers(k, context)
        left = context.tokens.leftpad
        if transfers is not None:
            (q,) = transfers.send(q)
            left = None if left is None else transfers.send(left)[0]
        sampled = tables.sampled(q, share=self.share)  # [B H T]
        rows = torch.arange(k.shape[1], device=q.device)
        first = torch.zeros(1, 1, 1, device=q.device) if left is None else left[:, None, None]
        exact = (rows < first + self.sinks) | (rows >= k.shape[1] - self.recent)
        read = ((sampled | exact) & (rows >= first)).sum(-1).float().mean().item()
        return Reads(read, read + tables.looked_up(q, share=self.share).float().mean().item())

    def _tables(self, k: Tensor, prompt: int, context: AttentionContext) -> HashTables:
        """Return the tables of the memory, or build some of k [B Tk Hk D]."""
        memory, left = context.memory, context.tokens.leftpad
        if isinstance(memory, TablesLayer):
            if memory.hashed is not None:
                return memory.hashed
            if self._transfers(k, context) is not None:
                left = memory.leftpad  # where the keys are
        tables = HashTables.build(
            k[:, :prompt], bits=self.bits, tables=self.tables, seed=self.seed,
            leftpad=None if left is None else left.int(),
        )  # fmt: skip
        tables.follow(k)
        return tables

    def _transfers(self, k: Tensor, context: AttentionContext) -> Transfers | None:
        """Return what moves queries to keys of the memory; None: they lie on one device."""
        transfers = None if context.memory is None else context.memory.transfers
        return None if transfers is None or k.device != transfers.device else transfers

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Return one decode step as launches, or why there is none."""
        if self.memory_device is not None:
            return "queries go to the device of the memory, and results come back: no launches"
        return super().step(memory, layer)

    def sampled_step(self, memory: Memory, layer: StepLayer) -> Step | None:
        """Write the new token and its code, and read what it samples."""
        if not isinstance(memory, TablesLayer) or not memory.is_decoding:
            return None

        def run(step: StepTensors) -> Tensor:
            from bitnet_triton.kernels.lsh_sampling.launchers import triton_sampling

            q = memory.write(step.heads, step.cos, step.sin, step.places)
            keys, values = (store.transpose(1, 2) for store in memory.stores)
            assert memory.hashed is not None
            call = memory.hashed.call(
                self.share, sinks=self.sinks, recent=self.recent, scale=layer.scale,
                leftpad=step.places[LEFTPAD], used=step.places[USED],
            )  # fmt: skip
            return triton_sampling(q, keys, values, call)[0]

        return run
