"""Greedy decoding of a whole model of 2B-4T shapes, through transformers' ``generate``.

With a static cache transformers compiles the decode step and replays it as a graph. Runs that are
timed share such a cache: with another one the graph would be recorded again. With a dynamic cache
this package records its own steps, anew in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from bench.case import Case, Provider, Settings, Work
from bench.models import SHAPES, RandomModels, state_bytes

# of the logits, in bf16: roundings of 30 layers (bench/models.py)
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Inputs:
    """One point: the models, the prompt [B T], and how many tokens follow it."""

    models: RandomModels
    ids: Tensor
    new: int

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits of the prompt: later tokens differ where two logits nearly tie."""
        return model(self.ids, use_cache=False).logits


def _generate(kind: str, cache: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        model, new = inputs.models.get(kind), inputs.new
        B, T = inputs.ids.shape
        settings: dict[str, Any] = {
            "max_new_tokens": new, "eos_token_id": None, "do_sample": False, "pad_token_id": 0,
        }  # fmt: skip
        if cache == "static":
            kept = StaticCache(config=model.config, max_cache_len=T + new)
            settings["past_key_values"] = kept
        else:  # each run makes one of its own
            kept, settings["cache_implementation"] = None, cache

        def generate() -> Tensor:
            tokens = model.generate(inputs.ids, **settings)
            if kept is not None:
                kept.reset()
            if tokens.shape[1] != T + new:
                raise AssertionError(f"expected {T + new} tokens, got {tokens.shape[1]}")
            return tokens

        held = state_bytes(model)
        moved = held + B * inputs.models.shape.kv_bytes(T + new // 2)
        generate()  # compiles and records: what is warmed up and timed is a decode step
        return Work(
            generate,
            lambda: inputs.logits(model),
            read_bytes=new * moved,
            units=B * new,
            details={"state_bytes": held, "layers": inputs.models.shape.layers},
        )

    return build


def case(*, shape: str = "2b4t", prompt: int = 16, new: int = 512) -> Case:
    """Return the case: one sequence, and eight."""
    widths = SHAPES[shape]
    built: dict[tuple[torch.device, int], RandomModels] = {}

    def inputs(B: int, prompt: int, new: int, settings: Settings) -> Inputs:
        key = settings.device, settings.seed
        if key not in built:
            built[key] = RandomModels(widths, settings)
        ids = torch.randint(
            2, widths.vocab, (B, prompt), generator=settings.generator, device=settings.device
        )
        return Inputs(built[key], ids, new)

    def flops(B: int, prompt: int, new: int) -> float:
        return 2.0 * B * new * (widths.layers * widths.layer_weights + widths.head_weights)

    ours = "after bitnet_triton.fuse"
    return Case(
        name="generate",
        title="A whole model, decoding",
        grid=[{"B": B, "prompt": prompt, "new": new} for B in (1, 8)],
        inputs=inputs,
        reference=lambda inputs: inputs.logits(inputs.models.get("autobitlinear")),
        providers={
            "bitnet_triton": Provider(
                "bitnet_triton, static cache", _generate("fused", "static"), _TOLERANCE, "int8",
                ours,
            ),
            "bitnet_triton_dynamic": Provider(
                "bitnet_triton, dynamic cache", _generate("fused", "dynamic"), _TOLERANCE, "int8",
                f"{ours}, decode steps recorded",
            ),
            "transformers": Provider(
                "hf autobitlinear, static cache", _generate("autobitlinear", "static"),
                _TOLERANCE, "bf16", "unpacked to bf16 at load",
            ),
        },
        baselines=("transformers",),
        flops=flops,
        unit="tokens",
    )  # fmt: skip
