"""A decode step over the rows that a policy keeps, and over all rows of a plain cache.

Every memory has read the same tokens and has chosen a fifth of them, each head its own. Attention
alone has the heads of the published 2B model, recorded; copies of what it reads take turns, so that
no call finds in a cache what the last one left there. A step of layers is that of ``page_steps``,
with everything that a memory does between two steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.case import Case, Provider, Settings, Work
from bench.cases import page_steps
from bitnet_triton.cache import Attended, Call, GrowingLayer, parse_memory
from bitnet_triton.cache.h2o import H2OLayer
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.models.fused.step import DecodeSteps
from bitnet_triton.runtime import capture

_H, _HK, _D = 20, 5, 128
_SHARE = 5  # one row of so many is kept
_OBSERVED = 128  # last tokens of a prompt, whose attention the policies see
_COPIES_BYTES = 96 * 2**20  # three times the last-level cache of a common server's share
_POLICIES = {"snapkv": "a fifth by snapkv", "h2o": "a fifth by h2o"}


@dataclass(frozen=True, eq=False)
class Heads:
    """A query [1 1 H D], and keys and values [1 Hk T + 1 D], the last ones its own."""

    q: Tensor
    k: Tensor
    v: Tensor


class _NeverRecorded(DecodeSteps):
    """Leaves every step to the layers, one after the other."""

    def run(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return None


def _policy(name: str, k: Tensor, v: Tensor, H: int) -> Any:
    """Return a memory that has read k and v [1 Hk T D], and has kept a fifth of the rows.

    Queries of the last tokens are drawn, and what earlier ones gave to ``h2o`` is: a choice costs
    as much whatever it falls on.
    """
    Hk, T, D = k.shape[1:]
    memory: Any = parse_memory({"name": name, "budget": T // _SHARE}).memory()
    random = torch.Generator(k.device).manual_seed(T)
    last = min(_OBSERVED, T // 2)
    memory.update(k[:, :, :-last], v[:, :, :-last])
    if isinstance(memory, H2OLayer):
        memory.mass = torch.rand(1, Hk, T - last, generator=random, device=k.device)
    whole = memory.update(k[:, :, -last:], v[:, :, -last:])
    q = torch.randn(1, last, H, D, generator=random, device=k.device).to(k.dtype)
    keys, values = (t.transpose(1, 2) for t in whole)
    _, lse = flash_attention(q, keys, values, return_lse=True)
    memory.after(Attended(q, keys, lse, D**-0.5))
    return memory


def _plain(k: Tensor, v: Tensor) -> Any:
    memory = GrowingLayer()
    memory.update(k, v)
    return memory


def _memory(name: str, k: Tensor, v: Tensor, H: int) -> Any:
    return _plain(k, v) if name == "plain" else _policy(name, k, v, H)


def _held_bytes(memory: Any) -> int:
    """Return the bytes that a step reads at least: keys and values, and scores that it adds to."""
    rows = memory.keys.nbytes + memory.values.nbytes
    scores = getattr(memory, "mass", None)
    return rows if scores is None else rows + 4 * scores[..., : memory.held].numel()


def _heads(name: str) -> Callable[[Heads], Work]:
    def build(inputs: Heads) -> Work:
        q, scale = inputs.q, inputs.q.shape[-1] ** -0.5
        (k, new_k), (v, new_v) = (t.split([t.shape[2] - 1, 1], 2) for t in (inputs.k, inputs.v))
        T = k.shape[2]
        with torch.no_grad():
            first = _memory(name, k, v, q.shape[2])
            first.reserve(1)  # one that is full drops rows for its new token
        nbytes = _held_bytes(first)
        recorded = []
        with torch.no_grad(), torch.inference_mode(False):
            for _ in range(max(2, -(-_COPIES_BYTES // nbytes))):
                memory = copy.deepcopy(first)
                for store, new in zip(memory.stores, (new_k, new_v)):
                    store[:, :, memory.held : memory.held + 1] = new
                places = memory.places(Call(T, position=T))
                memory.decode(q, places, mask=Mask(), scale=scale)  # compiled and loaded
                with capture(torch.device("cpu")) as graph:
                    out, _ = memory.decode(q, places, mask=Mask(), scale=scale)
                recorded.append((graph.replay, out))
        turns = cycle(replay for replay, _ in recorded)

        def output() -> Tensor:
            for replay, _ in recorded:
                replay()
            return recorded[0][1]

        def expected() -> Tensor:
            kept = (
                torch.cat([held, new], 2).transpose(1, 2).float()
                for held, new in ((first.keys, new_k), (first.values, new_v))
            )
            return attention_reference(q.float(), *kept, mask=Mask(), scale=scale)[0]

        at_most = (k.nbytes + v.nbytes) / nbytes
        return Work(
            lambda: next(turns)(), output, expected, read_bytes=nbytes,
            details={"at_most": {"plain": at_most}},
        )  # fmt: skip

    return build


def _layers(name: str) -> Callable[[page_steps.Inputs], Work]:
    def build(inputs: page_steps.Inputs) -> Work:
        H = inputs.decoder.config.num_attention_heads
        held = [_memory(name, k, v, H) for k, v in inputs.held]
        weights = page_steps.layer_bytes(inputs)
        nbytes = sum(map(_held_bytes, held)) + weights
        plain = sum(k.nbytes + v.nbytes for k, v in inputs.held) + weights
        alike = copy.deepcopy(held)
        steps = page_steps.Steps(inputs, Cache(held))
        # so many that rows are dropped once, where tokens that come take the place of others
        calls = held[0].held // 32 + 1 if getattr(held[0], "is_continuous", False) else 1

        def call() -> None:
            for _ in range(calls):
                steps()

        def expected() -> Tensor:
            inputs.decoder.decode_steps = _NeverRecorded()
            with torch.no_grad():
                hidden = [
                    inputs.decoder(
                        input_ids=token, past_key_values=cache, use_cache=True
                    ).last_hidden_state
                    for token in inputs.tokens.split(1, dim=1)
                ]
            return torch.cat(hidden, dim=1)

        cache = Cache(alike)
        return Work(
            call, lambda: steps.first, expected, read_bytes=nbytes, calls=calls,
            details={"at_most": {"plain": plain / nbytes}},
        )  # fmt: skip

    return build


def _provider(name: str) -> Callable[[Any], Work]:
    def build(inputs: Any) -> Work:
        return (_heads if isinstance(inputs, Heads) else _layers)(name)(inputs)

    return build


def _inputs(of: str, T: int, settings: Settings) -> Heads | page_steps.Inputs:
    if of != "attention":
        return page_steps.make_inputs(of, "bf16", T, settings)

    random = settings.generator

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random).bfloat16()

    k, v = (randn(1, _HK, T + 1, _D) for _ in range(2))
    return Heads(randn(1, 1, _H, _D), k, v)


def _flops(of: str, T: int) -> float:
    return 4.0 * _H * _D * T if of == "attention" else page_steps.flops(of, "bf16", T)


def case() -> Case:
    """Return the case."""
    return Case(
        name="policy_steps",
        title="Decode steps over the rows that a policy keeps",
        grid=[{"of": of, "T": 16384} for of in ("attention", "recall", "2b4t")],
        inputs=_inputs,
        reference=lambda inputs: torch.empty(0),  # each has its own: it reads other rows
        providers={
            name: Provider(label, _provider(name), 2e-2)
            for name, label in (("plain", "all rows"), *_POLICIES.items())
        },
        baselines=("plain",),
        flops=_flops,
        panels=((), ("of",)),
    )
