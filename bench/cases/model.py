"""A whole model of 2B-4T shapes with random ternary weights: prefill, and decoding with a cache.

Decoding is greedy, one token a step, through transformers' DynamicCache. The head is bf16 and tied
to the embedding, as published: of the bytes that a step reads it is more than half. Providers with
a head of eight bits say so. The cached tokens of a decode step are computed once, by ours, and once
by llama.cpp for itself: their number matters, who computed them does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.decoding import STEPS, Context, Decoder, LlamaDecoder, LlamaModels, prefill
from bench.llamacpp import BLOCK
from bench.machine import available_memory_bytes
from bench.models import DTYPE, SHAPES, RandomModels, Shape, state_bytes
from bench.peers import LLAMA_CPP

# Of the whole logits, in bf16, against transformers with weights unpacked at load
TOLERANCE = 2e-2
_TITLES = {"2b4t": "BitNet b1.58 2B-4T", "tiny": "tiny"}
_MEMORY_SHARE = 0.6
_CHECKED_TOKENS = 32
# Caches of the longest context that are held at a time
_CACHES = 6


class Models:
    """Everything that the points of one run share, made when it is wanted.

    Args:
        shape: the widths.
        longest: tokens that a cache holds before decoding, at most.
        prompt: tokens of the prefill.
        settings: device and seed.
    """

    def __init__(self, shape: Shape, longest: int, prompt: int, settings: Settings) -> None:
        self.shape = shape
        self.random = RandomModels(shape, settings)
        self.llama = LlamaModels(shape, max(longest, prompt) + STEPS)
        self.ids = torch.randint(
            shape.vocab, (1, max(longest + 1, prompt)),
            generator=settings.generator, device=settings.device,
        )  # fmt: skip
        self._longest = longest
        self._context: Context | None = None

    def decoder(self, model: PreTrainedModel, context: int) -> Decoder:
        """Return what decodes behind the first ``context`` tokens."""
        if self._context is None:
            self._context = Context(self.random.get("fused"), self.ids[:, : self._longest])
        cache = self._context.first(context, model.config)
        return Decoder(model, cache, self.ids[:, context : context + 1])


@dataclass(frozen=True)
class Inputs:
    """One point: the models, how many tokens are cached before, and how many are read."""

    models: Models
    phase: str
    context: int
    tokens: int

    @property
    def shape(self) -> Shape:
        """The widths of the models."""
        return self.models.shape


def layers_that_fit(shape: Shape, available: int, longest: int = 0) -> int:
    """Return how many layers fit into a share of the memory, for all providers together."""
    # packed twice at most, and once in bf16; the head once, and the logits and temporaries
    fixed = 2 * DTYPE.itemsize * shape.head_weights
    per_layer = shape.layer_weights * (DTYPE.itemsize + 2 / 4)
    per_layer += _CACHES * shape.kv_bytes(longest) / shape.layers
    fitting = int((_MEMORY_SHARE * available - fixed) / per_layer)
    return max(0, min(shape.layers, fitting))


def _prefill_work(inputs: Inputs, model: PreTrainedModel, details: dict[str, Any]) -> Work:
    ids, keep = inputs.models.ids[:, : inputs.tokens], min(_CHECKED_TOKENS, inputs.tokens)
    return Work(
        call=lambda: prefill(model, ids, 1),
        output=lambda: prefill(model, ids, keep)[0],
        read_bytes=details["state_bytes"],
        units=inputs.tokens,
        details=details,
    )


def _decode_work(inputs: Inputs, model: PreTrainedModel, details: dict[str, Any]) -> Work:
    decoder = inputs.models.decoder(model, inputs.context)
    per_token = details["state_bytes"] + inputs.shape.kv_bytes(inputs.context)
    return Work(call=decoder.step, output=decoder.first_step, read_bytes=per_token, details=details)


def _build(kind: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        model = inputs.models.random.get(kind)
        details = {"layers": inputs.shape.layers, "state_bytes": state_bytes(model)}
        make = _prefill_work if inputs.phase == "prefill" else _decode_work
        return make(inputs, model, details)

    return build


def _build_int8_head(inputs: Inputs) -> Work:
    """Count the head in eight bits: its bf16 weight stays in memory, and is not read."""
    work = _build("int8_head")(inputs)
    spared = inputs.shape.head_weights * (DTYPE.itemsize - 1)
    return replace(work, read_bytes=work.read_bytes - spared)


def _build_eager(inputs: Inputs) -> Work:
    """Run transformers without the torch.compile that it wraps around parts of its layer."""
    work = _build("bitlinear")(inputs)
    eager = torch.compiler.set_stance("force_eager")
    return replace(work, call=eager(work.call), output=eager(work.output))


def _build_llama(head: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        LLAMA_CPP.need()
        if inputs.shape.hidden % BLOCK:
            raise PeerMissingError(f"needs rows of whole blocks of {BLOCK}")
        models = inputs.models.llama
        held = models.path(head).stat().st_size
        details = {"layers": inputs.shape.layers, "state_bytes": held}
        if inputs.phase == "prefill":
            peer = models.get(head)
            return Work(
                lambda: peer.prefill(inputs.tokens), read_bytes=held, units=inputs.tokens,
                compiles=False, details=details,
            )  # fmt: skip
        step = LlamaDecoder(models, head, inputs.context).step
        per_token = held + inputs.shape.kv_bytes(inputs.context)
        return Work(step, read_bytes=per_token, compiles=False, details=details)

    return build


def _reference(inputs: Inputs) -> Tensor:
    work = _build("autobitlinear")(inputs)
    return work.output()


def case(
    *,
    shape: str = "2b4t",
    layers: int | None = None,
    prompt: int = 512,
    contexts: Sequence[int] = (512, 4096),
) -> Case:
    """Return the case.

    Args:
        shape: "2b4t" or "tiny", which is for tests.
        layers: how many; None takes as many as the free memory allows.
        prompt: tokens of the prefill.
        contexts: tokens in the cache before decoding, a point for each.

    Raises:
        ValueError: a number is not positive, or not one layer fits into memory.
    """
    if shape not in SHAPES:
        raise ValueError(f"`shape`: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for name, value in (("prompt", prompt), *(("contexts", context) for context in contexts)):
        if value < 1:
            raise ValueError(f"`{name}`: expected at least 1, got {value}")
    full, longest = SHAPES[shape], max(contexts)
    fitting = layers
    if layers is None:
        fitting = layers_that_fit(full, available_memory_bytes(), longest)
    if fitting < 1:
        raise ValueError("`layers`: not one layer fits into the free memory")
    chosen = replace(full, layers=fitting)
    shared: dict[tuple[torch.device, int], Models] = {}

    def inputs(phase: str, context: int, tokens: int, settings: Settings) -> Inputs:
        key = settings.device, settings.seed
        if key not in shared:
            shared[key] = Models(chosen, longest, prompt, settings)
        return Inputs(shared[key], phase, context, tokens)

    def flops(phase: str, context: int, tokens: int) -> float:
        heads = 1 if phase == "prefill" else tokens  # prefill needs the last token's logits only
        attention = 4 * chosen.layers * chosen.hidden * tokens * (context + tokens / 2)
        linears = 2 * chosen.layers * chosen.layer_weights * tokens
        return linears + attention + 2 * heads * chosen.head_weights

    return Case(
        name="model",
        title=f"Model of {_TITLES[shape]} shapes, {fitting} of {full.layers} layers",
        grid=[
            {"phase": "prefill", "context": 0, "tokens": prompt},
            *({"phase": "decode", "context": context, "tokens": 1} for context in contexts),
        ],
        inputs=inputs,
        reference=_reference,
        providers=_PROVIDERS,
        baselines=("llama_cpp", "transformers_bf16", "llama_cpp_q8_head", "transformers_packed"),
        flops=flops,
        unit="tokens",
        panels=((), ("phase", "context")),
    )


_PROVIDERS = {
    "bitnet_triton": Provider(
        "bitnet_triton", _build("fused"), TOLERANCE, "int8", "bf16 head, after bitnet_triton.fuse"
    ),
    "bitnet_triton_int8_head": Provider(
        "bitnet_triton, int8 head", _build_int8_head, TOLERANCE, "int8",
        "and bitnet_triton.quantize_head",
    ),
    "bitnet_triton_unfused": Provider(
        "bitnet_triton, unfused", _build("unfused"), TOLERANCE, "int8",
        "each layer module by module", default=False,
    ),
    "transformers_packed": Provider(
        "hf bitlinear", _build("bitlinear"), TOLERANCE, "bf16",
        "transformers, unpacks on each call",
    ),
    "transformers_eager": Provider(
        "hf bitlinear, eager", _build_eager, TOLERANCE, "bf16",
        "transformers without its torch.compile", default=False,
    ),
    "transformers_bf16": Provider(
        "hf autobitlinear", _build("autobitlinear"), TOLERANCE, "bf16",
        "transformers, unpacked to bf16 at load: products of torch",
    ),
    "llama_cpp": Provider(
        "llama.cpp TQ2_0", _build_llama("F16"), None, "int8",
        "architecture bitnet (SiLU), weights of its own, f16 head; not compared",
    ),
    "llama_cpp_q8_head": Provider(
        "llama.cpp TQ2_0, q8 head", _build_llama("Q8_0"), None, "int8",
        "the same with a head of 8 bits",
    ),
}  # fmt: skip
