"""Requests of mixed lengths that are there at once: continuous batching, ours and transformers'.

Prompts have from an eighth of ``prompt`` tokens to all of them, answers from a third of ``new`` to
all of it, greedy. The model has one layer of 2B-4T's widths, and a vocabulary that is to them what
its own is to thirty. An engine is started once and goes on, as a server's does: its start, and the
collection of all garbage at its end, belong to no request.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.models import SHAPES, RandomModels, state_bytes

_SHAPES = {"2b4t": replace(SHAPES["2b4t"], layers=1, vocab=4288), "tiny": SHAPES["tiny"]}
_PAGE = 16
_STEP = 512
_GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
_NO_END = 2**31 - 1  # no vocabulary has it
# First tokens that may differ: logits of bf16 models nearly tie now and then
_TOLERANCE = 0.2


@dataclass(frozen=True, eq=False)
class Inputs:
    """One point: the models, the prompts, and how many tokens follow each."""

    models: RandomModels
    prompts: list[list[int]]
    new: list[int]

    @cached_property
    def first(self) -> list[int]:
        """The best token behind each prompt, computed alone and without a cache."""
        model = self.models.get("fused")
        with torch.inference_mode():
            logits = [
                model(
                    torch.tensor([prompt], device=self.models.device),
                    use_cache=False,
                    logits_to_keep=1,
                ).logits
                for prompt in self.prompts
            ]
        return [int(row[0, -1].argmax()) for row in logits]


def _alone(inputs: Inputs) -> list[list[int]]:
    model, device = inputs.models.get("fused"), inputs.models.device
    model.generation_config.eos_token_id = None  # as None in a call means what stands here
    answers = []
    for prompt, new in zip(inputs.prompts, inputs.new):
        ids = torch.tensor([prompt], device=device)
        tokens = model.generate(ids, max_new_tokens=new, **_GREEDY)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


def _started(model: PreTrainedModel, inputs: Inputs) -> Any:
    """Return the engine of ``model``, which goes on until nobody has the inputs any more."""
    rooms = zip(inputs.prompts, inputs.new)
    pages = sum(-(-(len(prompt) + new) // _PAGE) for prompt, new in rooms)
    settings = ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=pages + 1, max_batch_tokens=_STEP,
        max_requests_per_batch=len(inputs.prompts), allow_block_sharing=False,
    )  # fmt: skip
    manager = model.init_continuous_batching(
        GenerationConfig(**_GREEDY, eos_token_id=_NO_END), settings
    )
    manager.start()
    weakref.finalize(inputs, manager.stop, hard_stop=True)
    return manager


def _together(manager: Any, inputs: Inputs) -> list[list[int]]:
    names = [
        manager.add_request(prompt, max_new_tokens=new, eos_token_id=_NO_END)
        for prompt, new in zip(inputs.prompts, inputs.new)
    ]
    done: dict[str, list[int]] = {}
    while len(done) < len(names):
        one = manager.get_result(timeout=120)
        if one is None or one.error is not None:
            raise AssertionError("no answer" if one is None else one.error)
        done[one.request_id] = one.generated_tokens
    return [done[name] for name in names]


def _work(inputs: Inputs, answer: Callable[[], list[list[int]]]) -> Work:
    first = inputs.first

    def output() -> Tensor:
        answers = answer()
        assert [len(tokens) for tokens in answers] == inputs.new
        same = [tokens[0] == expected for tokens, expected in zip(answers, first)]
        return torch.tensor([sum(same) / len(same)])

    return Work(
        answer,
        output,
        units=sum(inputs.new),
        compiles=False,
        details={
            "prompt_tokens": sum(map(len, inputs.prompts)),
            "state_bytes": state_bytes(inputs.models.get("fused")),
        },
    )


def _engine(kind: str, implementation: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        if Version(transformers.__version__) < Version("5.23"):
            raise PeerMissingError("needs transformers 5.23 or later")
        model = inputs.models.get(kind)
        model.set_attn_implementation(implementation)
        manager = _started(model, inputs)
        return _work(inputs, lambda: _together(manager, inputs))

    return build


def case(*, shape: str = "2b4t") -> Case:
    """Return the case: many short texts, and fewer long ones."""
    widths = _SHAPES[shape]
    built: dict[tuple[torch.device, int], RandomModels] = {}

    def inputs(requests: int, prompt: int, new: int, settings: Settings) -> Inputs:
        key = settings.device, settings.seed
        if key not in built:
            built[key] = RandomModels(widths, settings)
        random = torch.Generator().manual_seed(settings.seed)
        draw = torch.rand(2, requests, generator=random)
        lengths = (prompt * (1 + 7 * draw[0]) / 8).int().tolist()
        answers = (new * (1 + 2 * draw[1]) / 3).int().tolist()
        prompts = [torch.randint(2, widths.vocab, (n,), generator=random).tolist() for n in lengths]
        return Inputs(built[key], prompts, answers)

    def flops(requests: int, prompt: int, new: int) -> float:
        tokens = requests * (prompt * 9 / 16 + new * 2 / 3)
        return 2.0 * tokens * widths.layers * widths.layer_weights

    return Case(
        name="many_requests",
        title="Many requests at once",
        grid=[
            {"requests": 64, "prompt": 256, "new": 48},
            {"requests": 16, "prompt": 2048, "new": 48},
        ],
        inputs=inputs,
        reference=lambda inputs: torch.ones(1),
        providers={
            "bitnet_triton": Provider(
                "continuous batching, our attention", _engine("fused_pages", "bitnet_triton"),
                _TOLERANCE, "int8", "pages read in place",
            ),
            "transformers": Provider(
                "continuous batching, sdpa", _engine("fused_sdpa", "sdpa"), _TOLERANCE, "int8",
                "the same model with our linears; every cached row is gathered",
            ),
            "alone": Provider(
                "generate, one after the other",
                lambda inputs: _work(inputs, lambda: _alone(inputs)), _TOLERANCE, "int8",
                "decode steps recorded",
            ),
        },
        baselines=("alone", "transformers"),
        flops=flops,
        unit="tokens",
    )  # fmt: skip
