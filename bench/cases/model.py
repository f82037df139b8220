"""A whole model of 2B-4T shapes with random ternary weights: prefill, and decoding with a cache.

Decoding is greedy, one token a step, through transformers' DynamicCache. The head is bf16 and tied
to the embedding, as published: of the bytes that a step reads here it is more than half.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.llamacpp import BLOCK, LlamaCpp, missing, write_gguf
from bench.machine import available_memory_bytes
from bench.models import DTYPE, SHAPES, RandomModels, Shape, state_bytes

# Of the whole logits, in bf16, against transformers with weights unpacked at load
TOLERANCE = 2e-2
_TITLES = {"2b4t": "BitNet b1.58 2B-4T", "tiny": "tiny"}
_MEMORY_SHARE = 0.6
_CHECKED_TOKENS = 32


@dataclass(frozen=True)
class Inputs:
    """One point: the models, the tokens [1, T], and how many of them are cached before."""

    models: RandomModels
    phase: str
    context: int
    tokens: int
    ids: Tensor


def layers_that_fit(shape: Shape, available: int) -> int:
    """Return how many layers fit into a share of the memory, for all providers together."""
    # packed twice at most, and once in bf16; the head once, and the logits and temporaries
    fixed = 2 * DTYPE.itemsize * shape.head_weights
    per_layer = shape.layer_weights * (DTYPE.itemsize + 2 / 4)
    fitting = int((_MEMORY_SHARE * available - fixed) / per_layer)
    return max(0, min(shape.layers, fitting))


def _prefill(model: PreTrainedModel, ids: Tensor, keep: int) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.logits, cache


def _prefill_work(inputs: Inputs, model: PreTrainedModel, details: dict[str, Any]) -> Work:
    keep = min(_CHECKED_TOKENS, inputs.tokens)
    return Work(
        call=lambda: _prefill(model, inputs.ids, 1),
        output=lambda: _prefill(model, inputs.ids, keep)[0],
        read_bytes=details["state_bytes"],
        units=inputs.tokens,
        details=details,
    )


class _Decoder:
    """Greedy decoding: each call makes one token from the last one and the cache.

    The cache grows from ``context`` tokens to twice that and is cut back.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, context: int) -> None:
        with torch.no_grad():
            _, self.cache = _prefill(model, ids[:, :context], 1)
        self.model = model
        self.first = self.token = ids[:, context : context + 1]
        self.context, self.made = context, 0

    def step(self) -> Tensor:
        """Return the logits after one more token."""
        if self.made == self.context:
            self.restart()
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        self.made += 1
        return logits

    def restart(self) -> None:
        """Forget what was decoded."""
        if self.made:
            self.cache.crop(-self.made)
        self.token, self.made = self.first, 0

    def first_step(self) -> Tensor:
        """Return the logits of the first step: later tokens differ where two logits nearly tie."""
        self.restart()
        return self.step()


def _decode_work(inputs: Inputs, model: PreTrainedModel, details: dict[str, Any]) -> Work:
    decoder = _Decoder(model, inputs.ids, inputs.context)
    per_token = details["state_bytes"] + inputs.models.shape.kv_bytes(inputs.context)
    return Work(
        call=decoder.step,
        output=decoder.first_step,
        read_bytes=per_token,
        units=1,
        details={**details, "bytes_read_per_token": per_token},
    )


def _build(kind: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        model = inputs.models.get(kind)
        details = {"layers": inputs.models.shape.layers, "state_bytes": state_bytes(model)}
        make = _prefill_work if inputs.phase == "prefill" else _decode_work
        return make(inputs, model, details)

    return build


def _build_int8_head(inputs: Inputs) -> Work:
    """Count the head in eight bits: its bf16 weight stays in memory, and is not read."""
    work = _build("int8_head")(inputs)
    spared = inputs.models.shape.head_weights * (DTYPE.itemsize - 1)
    return replace(work, read_bytes=work.read_bytes - spared)


def _build_eager(inputs: Inputs) -> Work:
    """Run transformers without the torch.compile that it wraps around parts of its layer."""
    work = _build("bitlinear")(inputs)
    eager = torch.compiler.set_stance("force_eager")
    return replace(work, call=eager(work.call), output=eager(work.output))


@functools.cache
def _gguf(shape: Shape, head: str) -> tuple[tempfile.TemporaryDirectory, Path]:
    """Write a model for llama.cpp, once for all points; its folder goes with the process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.gguf"
    write_gguf(path, shape, head=head)
    return folder, path


class _LlamaDecoder:
    """Greedy decoding in llama.cpp, cut back like ``_Decoder``."""

    def __init__(self, peer: LlamaCpp, context: int) -> None:
        self.peer, self.context, self.made = peer, context, 0
        peer.prefill(context)

    def step(self) -> None:
        if self.made == self.context:
            self.peer.crop(self.context)
            self.made = 0
        self.peer.decode()
        self.made += 1


def _build_llama(head: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        shape = inputs.models.shape
        reason = missing() or (
            f"needs rows of whole blocks of {BLOCK}" if shape.hidden % BLOCK else None
        )
        if reason:
            raise PeerMissingError(reason)
        _, path = _gguf(shape, head)
        threads = torch.get_num_threads()
        peer = LlamaCpp(path, threads=threads, context=2 * (inputs.context + inputs.tokens))
        details = {"layers": shape.layers, "state_bytes": path.stat().st_size}
        if inputs.phase == "prefill":
            return Work(
                lambda: peer.prefill(inputs.tokens), read_bytes=details["state_bytes"],
                units=inputs.tokens, details=details,
            )  # fmt: skip
        per_token = details["state_bytes"] + shape.kv_bytes(inputs.context)
        return Work(_LlamaDecoder(peer, inputs.context).step, read_bytes=per_token, details=details)

    return build


def _reference(inputs: Inputs) -> Tensor:
    work = _build("autobitlinear")(inputs)
    return work.output()


def case(
    *,
    shape: str = "2b4t",
    layers: int | None = None,
    prompt: int = 512,
    context: int = 64,
) -> Case:
    """Return the case.

    Args:
        shape: "2b4t" or "tiny", which is for tests.
        layers: how many; None takes as many as the free memory allows.
        prompt: tokens of the prefill.
        context: tokens in the cache before decoding.

    Raises:
        ValueError: a number is not positive, or not one layer fits into memory.
    """
    if shape not in SHAPES:
        raise ValueError(f"`shape`: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for name, value in (("prompt", prompt), ("context", context)):
        if value < 1:
            raise ValueError(f"`{name}`: expected at least 1, got {value}")
    full = SHAPES[shape]
    fitting = layers_that_fit(full, available_memory_bytes()) if layers is None else layers
    if fitting < 1:
        raise ValueError("`layers`: not one layer fits into the free memory")
    chosen = replace(full, layers=fitting)
    built: dict[Settings, RandomModels] = {}

    def inputs(phase: str, context: int, tokens: int, settings: Settings) -> Inputs:
        if settings not in built:
            built[settings] = RandomModels(chosen, settings)
        random = settings.generator
        ids = torch.randint(
            chosen.vocab, (1, context + tokens), generator=random, device=settings.device
        )
        return Inputs(built[settings], phase, context, tokens, ids)

    def flops(phase: str, context: int, tokens: int) -> float:
        heads = 1 if phase == "prefill" else tokens  # prefill needs the last token's logits only
        attention = 4 * chosen.layers * chosen.hidden * tokens * (context + tokens / 2)
        linears = 2 * chosen.layers * chosen.layer_weights * tokens
        return linears + attention + 2 * heads * chosen.head_weights

    return Case(
        name="model",
        title=f"Model of {_TITLES[shape]} shapes, {fitting} of {full.layers} layers, bf16 head",
        grid=[
            {"phase": "prefill", "context": 0, "tokens": prompt},
            {"phase": "decode", "context": context, "tokens": 1},
        ],
        inputs=inputs,
        reference=_reference,
        providers={
            "bitnet_triton": Provider(
                "bitnet_triton", _build("fused"), TOLERANCE, "int8", "after bitnet_triton.fuse",
            ),
            "bitnet_triton_int8_head": Provider(
                "bitnet_triton, int8 head", _build_int8_head, TOLERANCE, "int8",
                "and bitnet_triton.quantize_head", default=False,
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
                "transformers, unpacked to bf16 at load",
            ),
            "llama_cpp": Provider(
                "llama.cpp TQ2_0", _build_llama("F16"), None, "int8",
                "architecture bitnet (SiLU), weights of its own, f16 head; not compared",
            ),
            "llama_cpp_q8_head": Provider(
                "llama.cpp TQ2_0, q8 head", _build_llama("Q8_0"), None, "int8",
                "the same with a head of 8 bits", default=False,
            ),
        },
        baselines=("llama_cpp", "transformers_packed", "transformers_bf16"),
        flops=flops,
        unit="tokens",
        panels=((), ("phase",)),
    )  # fmt: skip
