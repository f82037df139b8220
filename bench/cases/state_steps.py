"""A decode step of layers that keep a state, behind ever more tokens, and of those that keep keys.

A step is that of all layers, recorded, without the head of the model. Widths are those of 2B-4T
with random weights; all of its layers are linear (the gated delta rule with all that the mode
brings), or three of four, or none. A state has taken in as many random tokens as it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.cases.linear_attention import make_inputs as read_tokens
from bench.models import DTYPE, SHAPES, RandomModels, Shape, state_bytes
from bitnet_triton.cache import StateLayer
from bitnet_triton.models.bitnet.planned import build_cache
from bitnet_triton.models.fused.step import DecodeSteps

PLANS = {
    "linear": ["linear"] * 4,
    "hybrid": ["linear", "linear", "linear", "full"],
    "full": ["full"] * 4,
}
_GIVEN = 4  # steps before the timing: the second one that finds the cache in place is recorded
_MOST = 64  # after so many steps a cache counts as before
LARGEST_CACHE = 2**30
_TOLERANCE = 2e-2  # in bf16: roundings turn codes of activations


@dataclass(frozen=True, eq=False)
class Inputs:
    """What models and caches are made of.

    Attributes:
        models: with four layers.
        T: tokens before a step.
        state: float32 [1 Hk D D], what they have made of one that was empty.
        tokens: [1 steps], that follow.
        settings: of the run.
    """

    models: RandomModels
    T: int
    state: Tensor
    tokens: Tensor
    settings: Settings

    def decoder(self, kind: str) -> Any:
        """Return a fused decoder with the modes of a plan, and what these bring along."""
        layers = PLANS[kind]
        model: Any = self.models.get("fused", {"prefill": layers, "decode": layers}).model
        torch.manual_seed(self.settings.seed)
        for layer, mode in zip(model.layers, model.attention_plan.decode):
            fresh = mode.module(model.config)
            if fresh is not None:
                getattr(layer.self_attn, mode.name).load_state_dict(fresh.state_dict())
        return model

    def cache(self, decoder: Any, kind: str) -> Cache:
        """Return a cache of ``T`` tokens."""
        shape, random = self.models.shape, self.settings.generator
        row = 2 * shape.kv_heads * shape.head_size * DTYPE.itemsize
        size = PLANS[kind].count("full") * row * self.T
        if size > LARGEST_CACHE:
            raise PeerMissingError(f"its cache would take {size / 2**30:.1f} GB")
        cache = build_cache(decoder.attention_plan, shape.layers)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random, device=self.settings.device).to(DTYPE)

        heads = shape.heads + 2 * shape.kv_heads
        for layer in cache.layers:
            if isinstance(layer, StateLayer):
                tail = randn(1, 3, heads * shape.head_size)
                saved = {"state": self.state.clone(), "tail": tail, "tokens": torch.tensor(self.T)}
                layer.restore(saved)
            else:
                keys = (randn(1, shape.kv_heads, self.T, shape.head_size) for _ in range(2))
                layer.update(*keys)
        return cache


class Steps:
    """Recorded steps over a cache, again and again over the same token.

    Attributes:
        first: hidden states [1 steps D] of the first steps, of which the last ones were recorded.
        at_once: those that one call gives for the same tokens.
        held: bytes of the cache.
    """

    def __init__(self, inputs: Inputs, kind: str) -> None:
        self._decoder = inputs.decoder(kind)
        self._cache = inputs.cache(self._decoder, kind)
        self._token, self._made = inputs.tokens[:, -1:], 0
        self._steps = DecodeSteps()  # with a recording of its own
        with torch.no_grad():
            self.at_once = self._call(inputs.tokens)
            self._cache.crop(-_GIVEN)
            self.first = torch.cat([self._call(t) for t in inputs.tokens.split(1, dim=1)], dim=1)
        if self._steps.recording is None:
            raise AssertionError("no decode step was recorded")
        layers: list[Any] = self._cache.layers
        self.held = sum(t.nbytes for layer in layers for t in _kept(layer, inputs.T))

    def _call(self, tokens: Tensor) -> Tensor:
        self._decoder.decode_steps = self._steps
        return self._decoder(
            input_ids=tokens, past_key_values=self._cache, use_cache=True
        ).last_hidden_state

    def __call__(self) -> None:
        """Make one step."""
        if self._made == _MOST:
            for layer in self._cache.layers:
                if isinstance(layer, StateLayer):  # whose size and time no number of tokens changes
                    layer.tokens -= self._made
                else:
                    layer.crop(-self._made)  # type: ignore[attr-defined]
            self._made = 0
        self._call(self._token)
        self._made += 1


def _kept(layer: Any, T: int) -> list[Tensor]:
    """Return what a layer has to keep of its tokens: a state and inputs, or keys and values."""
    if isinstance(layer, StateLayer):
        return [t for t in (layer.state, layer.tail) if t is not None]
    return [layer.keys[:, :, :T], layer.values[:, :, :T]]


def _work(kind: str) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        steps = Steps(inputs, kind)
        layers = state_bytes(steps._decoder) - steps._decoder.embed_tokens.weight.nbytes
        return Work(
            steps, lambda: steps.first, lambda: steps.at_once, read_bytes=layers + steps.held,
            details={"cache_bytes": steps.held},
        )  # fmt: skip

    return build


def _shape(name: str) -> Shape:
    return replace(SHAPES[name], vocab=min(1024, SHAPES[name].vocab), layers=4)


def _inputs(model: str, T: int, settings: Settings) -> Inputs:
    shape = _shape(model)
    state = read_tokens("decode", "fp32", T, shape.kv_heads, shape.head_size, settings).state
    assert state is not None
    tokens = torch.randint(
        2, shape.vocab, (1, _GIVEN), generator=settings.generator, device=settings.device
    )
    return Inputs(RandomModels(shape, settings), T, state, tokens, settings)


def case() -> Case:
    """Return the case."""
    labels = {"linear": "four linear layers", "hybrid": "three of four", "full": "keys and values"}
    lengths = (2**10, 2**14, 2**16, 2**18, 2**20)
    return Case(
        name="state_steps",
        title="Decode steps behind T tokens",
        grid=[{"model": "2b4t", "T": T} for T in lengths],
        inputs=_inputs,
        reference=lambda inputs: inputs.state,  # each is compared with a call of its own
        providers={
            kind: Provider(label, _work(kind), _TOLERANCE) for kind, label in labels.items()
        },
        baselines=("full", "hybrid"),
        # of the linears; what attention adds depends on the provider
        flops=lambda model, T: 2.0 * _shape(model).layers * _shape(model).layer_weights,
        curve="T",
    )
