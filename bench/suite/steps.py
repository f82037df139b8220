"""The layers of one decode step, recorded: with kernels that overlap, and one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.case import Case, Provider, Settings, Work
from bench.models import SHAPES, RandomModels, Shape
from bench.suite import speed
from bench.suite.checks import Checks, assert_same
from bench.suite.plan import Item, Plan
from bitnet_triton.models.fused.step import DecodeSteps
from bitnet_triton.runtime.overlap import in_order

Mode = Callable[[], AbstractContextManager[None]]

_SEEN = 64
_CHECKED_STEPS = 48


@dataclass(frozen=True)
class Inputs:
    """A fused decoder, the tokens of a prompt [B T] and those that follow it [B steps]."""

    models: RandomModels
    prompt: Tensor
    following: Tensor

    def decode(self, mode: Mode) -> tuple[Tensor, DecodeSteps]:
        """Return the hidden states of steps [B steps D], and what has run them."""
        decoder: Any = self.models.get("fused").model
        decoder.decode_steps = DecodeSteps()  # with a recording of its own
        cache = DynamicCache(config=decoder.config)
        found = []
        with torch.no_grad(), mode():
            decoder(input_ids=self.prompt, past_key_values=cache, use_cache=True)
            for token in self.following.split(1, dim=1):
                out = decoder(input_ids=token, past_key_values=cache, use_cache=True)
                found.append(out.last_hidden_state)
        if decoder.decode_steps.recording is None:
            raise AssertionError("no decode step was recorded")
        return torch.cat(found, dim=1), decoder.decode_steps


def _inputs(shape: Shape, B: int, T: int, steps: int, settings: Settings) -> Inputs:
    ids = torch.randint(
        2, shape.vocab, (B, T + steps), generator=settings.generator, device=settings.device
    )
    return Inputs(RandomModels(shape, settings), ids[:, :T], ids[:, T:])


def _check(shape: Shape, B: int, settings: Settings) -> None:
    """A kernel that does not wait for its inputs gives other values, in one step or another."""
    inputs = _inputs(shape, B, _SEEN, _CHECKED_STEPS, settings)
    expected, _ = inputs.decode(in_order)
    for _ in range(3):
        hidden, _ = inputs.decode(contextlib.nullcontext)
        assert_same("hidden states", hidden, expected)


def checks(plan: Plan) -> Sequence[Item]:
    """Return the checks that kernels which overlap compute what they do one after the other."""
    found = Checks(plan)
    shape = SHAPES["tiny"] if plan.small else replace(SHAPES["2b4t"], layers=6, vocab=1024)
    for B in (1, 4):
        what = f"{B} x {_CHECKED_STEPS}"
        # nothing may stand between two kernels that overlap
        found.add(
            "decode steps", what, lambda B=B: _check(shape, B, plan.settings), backend=None,
            poisoned=False,
        )  # fmt: skip
    return found.items


def _recorded(mode: Mode) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        hidden, steps = inputs.decode(mode)
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


def items(plan: Plan) -> Sequence[Item]:
    """Return steps of one sequence and of eight, behind few tokens and behind many."""
    shape = SHAPES["tiny"] if plan.small else replace(SHAPES["2b4t"], vocab=1024)
    sizes = [(1, 8), (2, 8)] if plan.small else [(1, 512), (8, 512), (1, 4096)]
    grid = [{"B": B, "T": T} for B, T in sizes]
    case = Case(
        name="steps",
        title="Layers of a decode step",
        grid=grid,
        inputs=lambda B, T, settings: _inputs(shape, B, T, 4, settings),
        reference=lambda inputs: inputs.decode(in_order)[0],
        providers={
            speed.OURS: Provider(
                "bitnet_triton", _recorded(contextlib.nullcontext), 0.0, "int8", "kernels overlap"
            ),
            "bitnet_triton_in_order": Provider(
                "bitnet_triton, in order", _recorded(in_order), 0.0, "int8",
                "one kernel after the other",
            ),
        },
        baselines=("bitnet_triton_in_order",),
        flops=lambda B, T: 2.0 * B * shape.layers * shape.layer_weights,
    )  # fmt: skip
    return speed.items(case, plan, quick=grid[:1], backend=None)
