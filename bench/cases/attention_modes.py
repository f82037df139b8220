"""Decode steps of one model under several attention modes, behind a long context.

All modes take turns in the same rounds, with their steps recorded and without. Each is checked
against the logits of one forward over all tokens, without a cache, of the unfused model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.decoding import Decoder, all_threads, prefill
from bench.models import SHAPES, RandomModels, Shape, state_bytes
from bitnet_triton.attention.masked import MaskMode

_GIVEN = 4  # steps before the timing: the second one that finds the cache in place is recorded
_TOLERANCE = 2e-2  # of the logits, in bf16, as in the case ``model``
DEFAULT = (
    "full", "sliding,window=1024", "longformer,window=1024,global_tokens=0", "local,block=1024",
    "streaming,window=1024", "strided,block=64", "fixed,block=64",
)  # fmt: skip


def parse(text: str) -> str | dict[str, Any]:
    """Read a mode as the command line has it, "sliding,window=1024,sinks=4", or its JSON.

    A list of one number or more is written as "global_tokens=0+7".

    Raises:
        ValueError: the text has another form.
    """
    if text.startswith("{"):
        return json.loads(text)
    name, *settings = text.split(",")
    found: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not key or not value:
            raise ValueError(f"`attention`: expected MODE[,KEY=VALUE...], got {text!r}")
        if key == "global_tokens":
            found[key] = [int(n) for n in value.split("+")]
        else:
            found[key] = json.loads(value) if value[0] in "0123456789.tf[" else value
    return {"mode": name, **found} if found else name


@dataclass(frozen=True)
class Inputs:
    """The models, and the tokens [1 context + _GIVEN], of which the last ones are steps."""

    models: RandomModels
    ids: Tensor


class _Unrecorded:
    """Stands for what records decode steps, and lets the model run each."""

    recording = None

    def run(self, *_: Any, **__: Any) -> None:
        return None


def _read_bytes(model: PreTrainedModel, shape: Shape, tokens: int) -> int:
    """Return the bytes of the weights, and of the keys and values that a query sees.

    Of a mode that is more than a mask, all that are cached count.
    """
    modes = (model.attention_plan.mode(layer, "decode") for layer in range(shape.layers))
    share = 0.0
    for mode in modes:
        seen = mode.mask.visible(1, tokens) if isinstance(mode, MaskMode) else torch.ones(1)
        share += seen.double().mean().item() / shape.layers
    return state_bytes(model) + int(share * shape.kv_bytes(tokens))


def _expected(inputs: Inputs, attention: Any) -> Tensor:
    model = inputs.models.get("unfused", attention)
    with all_threads(), torch.no_grad():
        return model(inputs.ids, use_cache=False, logits_to_keep=1).logits


def _build(attention: Any, recorded: bool) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        model = inputs.models.get("fused" if recorded else "fused, not recorded", attention)
        if not recorded:
            model.model.decode_steps = _Unrecorded()
        with all_threads(), torch.no_grad():
            _, cache = prefill(model, inputs.ids[:, :-_GIVEN], 1)
        tokens = inputs.ids[:, -_GIVEN:].split(1, dim=1)
        decoder = Decoder(model, cache, tokens[0])
        with torch.no_grad():
            for token in tokens:
                decoder.token = token
                logits = decoder.step()
        if recorded and model.model.decode_steps.recording is None:
            raise PeerMissingError("the steps of this mode are not recorded")
        return Work(
            decoder.step,
            lambda: logits,
            lambda: _expected(inputs, attention),
            read_bytes=_read_bytes(model, inputs.models.shape, inputs.ids.shape[1]),
            details={"layers": inputs.models.shape.layers, "attention": attention},
        )

    return build


def case(
    *, shape: str = "2b4t", layers: int | None = None, contexts: Sequence[int] = (4096,),
    attention: Sequence[str] = DEFAULT,
) -> Case:  # fmt: skip
    """Return the case.

    Args:
        shape: "2b4t" or "tiny", which is for tests.
        layers: how many; None takes four.
        contexts: tokens in the cache before decoding, a point for each.
        attention: modes as ``parse`` reads them; the first is the one to compare with.

    Raises:
        ValueError: the shape or a mode is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"`shape`: expected one of {', '.join(SHAPES)}, got {shape!r}")
    widths = replace(SHAPES[shape], layers=layers or min(4, SHAPES[shape].layers))
    chosen = {text: parse(text) for text in attention}

    def inputs(context: int, tokens: int, settings: Settings) -> Inputs:
        ids = torch.randint(
            2, widths.vocab, (1, context + _GIVEN), generator=settings.generator,
            device=settings.device,
        )  # fmt: skip
        return Inputs(RandomModels(widths, settings), ids)

    def flops(context: int, tokens: int) -> float:
        return 2.0 * tokens * (widths.layers * widths.layer_weights + widths.head_weights)

    return Case(
        name="attention_modes",
        title=f"Decode steps of {shape} shapes, {widths.layers} layers, by attention mode",
        grid=[{"context": context, "tokens": 1} for context in contexts],
        inputs=inputs,
        reference=lambda _: torch.zeros(1),  # each mode has its own
        providers={
            f"{text}{'' if recorded else ' unrecorded'}": Provider(
                f"{text}{'' if recorded else ', not recorded'}", _build(mode, recorded),
                _TOLERANCE, "int8",
            )
            for text, mode in chosen.items()
            for recorded in (True, False)
        },
        baselines=(attention[0], f"{attention[0]} unrecorded"),
        flops=flops,
        unit="tokens",
        panels=((), ("context",)),
    )  # fmt: skip
