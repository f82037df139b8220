"""The layers of one decode step, recorded: with kernels that overlap, and one after the other.

Only GPUs since Hopper overlap kernels; elsewhere both are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.case import Case, Provider, Settings, Work
from bench.models import SHAPES, RandomModels
from bitnet_triton.models.fused.step import DecodeSteps
from bitnet_triton.runtime.overlap import in_order

Order = Callable[[], AbstractContextManager[None]]

_STEPS = 4


@dataclass(frozen=True)
class Inputs:
    """A fused decoder, the tokens of a prompt [B T] and those that follow it [B steps]."""

    models: RandomModels
    prompt: Tensor
    following: Tensor

    def decode(self, order: Order) -> tuple[Tensor, DecodeSteps]:
        """Return the hidden states of steps [B steps D], and what has run them."""
        decoder: Any = self.models.get("fused").model
        decoder.decode_steps = DecodeSteps()  # with a recording of its own
        cache = DynamicCache(config=decoder.config)
        found = []
        with torch.no_grad(), order():
            decoder(input_ids=self.prompt, past_key_values=cache, use_cache=True)
            for token in self.following.split(1, dim=1):
                out = decoder(input_ids=token, past_key_values=cache, use_cache=True)
                found.append(out.last_hidden_state)
        if decoder.decode_steps.recording is None:
            raise AssertionError("no decode step was recorded")
        return torch.cat(found, dim=1), decoder.decode_steps


def _recorded(order: Order) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        hidden, steps = inputs.decode(order)
        shape, (B, T) = inputs.models.shape, inputs.prompt.shape
        held = shape.layers * shape.layer_weights // 4

        def replay(steps: DecodeSteps = steps) -> None:
            # a graph knows addresses only: its recording holds the memory that it reads
            assert steps.recording is not None
            steps.recording.graph.replay()

        return Work(
            replay,
            lambda: hidden,
            read_bytes=held + B * shape.kv_bytes(T),
            details={"layers": shape.layers},
        )

    return build


def case(*, shape: str = "2b4t") -> Case:
    """Return the case: one sequence and eight, behind few tokens and behind many."""
    widths = replace(SHAPES[shape], vocab=min(1024, SHAPES[shape].vocab))

    def inputs(B: int, T: int, settings: Settings) -> Inputs:
        ids = torch.randint(
            2, widths.vocab, (B, T + _STEPS), generator=settings.generator, device=settings.device
        )
        return Inputs(RandomModels(widths, settings), ids[:, :T], ids[:, T:])

    return Case(
        name="decode_steps",
        title="Layers of a decode step, recorded",
        grid=[{"B": B, "T": T} for B, T in ((1, 512), (8, 512), (1, 4096))],
        inputs=inputs,
        reference=lambda inputs: inputs.decode(in_order)[0],
        providers={
            "bitnet_triton": Provider(
                "bitnet_triton", _recorded(contextlib.nullcontext), 0.0, "int8", "kernels overlap"
            ),
            "bitnet_triton_in_order": Provider(
                "bitnet_triton, in order", _recorded(in_order), 0.0, "int8",
                "one kernel after the other",
            ),
        },
        baselines=("bitnet_triton_in_order",),
        flops=lambda B, T: 2.0 * B * widths.layers * widths.layer_weights,
    )  # fmt: skip
