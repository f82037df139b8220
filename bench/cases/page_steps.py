"""A decode step over keys and values in pages, and over those of a plain cache.

A step is that of all layers, recorded, without the head of the model, which no cache changes. Pages
lie in a row, as those of a text that was read alone; apart: every other page is somebody else's; or
in random order among as many of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from bench.case import Case, Provider, Settings, Work
from bench.grid import DTYPES
from bench.models import SHAPES, RandomModels, Shape, state_bytes
from bitnet_triton import RECALL_MODEL, BitNetForCausalLM
from bitnet_triton.cache import Batch, PagePool
from bitnet_triton.cache.growing import grow_in_place
from bitnet_triton.cache.pages import paged_layers
from bitnet_triton.models.fused.step import DecodeSteps

_LAYERS = 4  # of the shapes that are drawn at random
_GIVEN = 4  # steps before the timing: the second one that finds the cache in place is recorded
_MOST = 64  # after so many steps a cache is cut back
_SIZES = (16, 32, 64)
_ORDERS = {
    "row": ("", "in a row"), "apart": ("_apart", "apart"), "random": ("_random", "in random order")
}  # fmt: skip
_TOLERANCE = 2e-2  # in bf16: roundings turn codes of activations
_RECALL = Shape(hidden=256, ffn=512, heads=4, kv_heads=4, vocab=1024, layers=3)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The layers of a model, and what their caches hold.

    Attributes:
        decoder: the fused decoder.
        held: of each layer keys and values [1 Hk T D].
        tokens: [1 steps], that follow.
    """

    decoder: Any
    held: list[tuple[Tensor, Tensor]]
    tokens: Tensor

    def reference(self) -> Tensor:
        """Return the hidden states of the first steps over a plain cache."""
        return Steps(self, plain_cache(self)).first


class Steps:
    """Recorded steps over a filled cache, again and again over the same tokens.

    Attributes:
        first: hidden states [1 steps D] of the first steps, of which the last ones were recorded.
    """

    def __init__(self, inputs: Inputs, cache: Cache) -> None:
        self._decoder, self._cache = inputs.decoder, cache
        self._token, self._made = inputs.tokens[:, -1:], 0
        self._steps = DecodeSteps()  # with a recording of its own
        with torch.no_grad():
            hidden = [self._step(token) for token in inputs.tokens.split(1, dim=1)]
        if self._steps.recording is None:
            raise AssertionError("no decode step was recorded")
        self.first = torch.cat(hidden, dim=1)

    def _step(self, token: Tensor) -> Tensor:
        self._decoder.decode_steps = self._steps
        return self._decoder(
            input_ids=token, past_key_values=self._cache, use_cache=True
        ).last_hidden_state

    def __call__(self) -> None:
        """Make one step."""
        if self._made == _MOST:
            # one that takes nothing back does not grow either: it drops others
            if all(layer.can_take_back(self._made) for layer in self._cache.layers):
                self._cache.crop(-self._made)
            self._made = 0
        self._step(self._token)
        self._made += 1


def filled(cache: Cache, inputs: Inputs) -> Cache:
    """Let an empty cache read what is held."""
    with torch.no_grad():
        for layer, (k, v) in zip(cache.layers, inputs.held):
            layer.update(k, v)
    return cache


def plain_cache(inputs: Inputs) -> Cache:
    """Return a cache of all that is held, as recorded steps make it."""
    cache = DynamicCache(config=inputs.decoder.config)
    grow_in_place(cache)
    return filled(cache, inputs)


class _Shuffled(PagePool):
    """A pool that gives out its pages in random order, not the first ones first."""

    def allocate(self, n: int) -> np.ndarray:
        everything = super().allocate(self.free)
        pages = np.random.default_rng(0).permutation(everything)
        self.release(pages[n:])
        return pages[:n]


def _paged(page_size: int, order: str) -> Callable[[Inputs], Cache]:
    def make(inputs: Inputs) -> Cache:
        tokens = inputs.held[0][0].shape[2] + _GIVEN + _MOST
        pages = -(-tokens // page_size)
        kind = _Shuffled if order == "random" else PagePool
        pool = kind(page_size, pages if order == "row" else 2 * pages)
        if order == "apart":
            pool.release(pool.allocate(2 * pages)[::2])
        return filled(Cache(paged_layers(Batch(pool), len(inputs.held))), inputs)

    return make


def layer_bytes(inputs: Inputs) -> int:
    """Return the bytes of the layers, of which a step reads all."""
    return state_bytes(inputs.decoder) - inputs.decoder.embed_tokens.weight.nbytes


def _work(make: Callable[[Inputs], Cache]) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        steps = Steps(inputs, make(inputs))
        read = sum(k.nbytes + v.nbytes for k, v in inputs.held)
        return Work(steps, lambda: steps.first, read_bytes=read + layer_bytes(inputs))

    return build


def _shape(model: str) -> Shape:
    """Return the widths of the embedded recall model, or of shapes with at most ``_LAYERS``."""
    if model == "recall":
        return _RECALL
    shape = SHAPES[model]
    return replace(shape, vocab=min(1024, shape.vocab), layers=min(_LAYERS, shape.layers))


def _decoder(model: str, dtype: torch.dtype, settings: Settings) -> Any:
    if model != "recall":
        return RandomModels(_shape(model), settings).get("fused", "full").model
    found = BitNetForCausalLM.from_pretrained(RECALL_MODEL, attention="full", dtype=dtype)
    return found.to(settings.device).eval().model


def make_inputs(model: str, dtype: str, T: int, settings: Settings) -> Inputs:
    """Draw keys, values and tokens for a model: the embedded one, or a shape drawn at random."""
    kind, random = DTYPES[dtype], settings.generator
    decoder = _decoder(model, kind, settings)
    config = decoder.config
    sizes = 1, config.num_key_value_heads, T, config.hidden_size // config.num_attention_heads

    def randn() -> Tensor:
        return torch.randn(sizes, generator=random, device=settings.device).to(kind)

    held = [(randn(), randn()) for _ in range(config.num_hidden_layers)]
    tokens = torch.randint(
        2, config.vocab_size, (1, _GIVEN), generator=random, device=settings.device
    )
    return Inputs(decoder, held, tokens)


def flops(model: str, dtype: str, T: int) -> float:
    """Count the products of the linears and of attention."""
    shape = _shape(model)
    return shape.layers * (2.0 * shape.layer_weights + 4.0 * shape.hidden * T)


def case() -> Case:
    """Return the case."""
    pages = {
        f"pages_{size}{_ORDERS[order][0]}": Provider(
            f"pages of {size}, {_ORDERS[order][1]}", _work(_paged(size, order)), _TOLERANCE
        )
        for size in _SIZES
        for order in _ORDERS
    }
    return Case(
        name="page_steps",
        title="Decode steps over pages",
        grid=[
            {"model": model, "dtype": dtype, "T": 16384}
            for model, dtype in (("recall", "fp32"), ("recall", "bf16"), ("2b4t", "bf16"))
        ],
        inputs=make_inputs,
        reference=lambda inputs: inputs.reference(),
        providers={
            "plain": Provider(
                "plain cache", _work(plain_cache), _TOLERANCE,
                note="keys and values of a head in a row",
            ),
            **pages,
        },
        baselines=("plain",),
        flops=flops,
        panels=((), ("model", "dtype")),
    )  # fmt: skip
