"""A decode step over keys and values kept as codes, and over those of a plain cache.

Attention alone has the heads of the published 2B model, recorded; copies of what it reads take
turns, so that no call finds in a cache what the last one left there. A step of layers is that of
``page_steps``, over the same heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.case import Case, Provider, Settings, Work
from bench.cases import page_steps
from bitnet_triton.cache import Quantised
from bitnet_triton.kernels import KeyValueCodes, Mask
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.runtime import capture
from bitnet_triton.runtime.huge_pages import in_huge_pages

_H, _HK, _D = 20, 5, 128
_COPIES_BYTES = 96 * 2**20  # three times the last-level cache of a common server's share
_MASK = Mask(causal=False)


@dataclass(frozen=True, eq=False)
class Heads:
    """A query [1 1 H D], and keys and values [Hk T D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def reference(self) -> Tensor:
        """Return attention to the keys as they are."""
        k, v = (t.float().transpose(0, 1)[None] for t in (self.k, self.v))
        scale = self.q.shape[-1] ** -0.5
        return attention_reference(self.q.float(), k, v, mask=_MASK, scale=scale)[0]


def _in_turns(launches: list[Callable[[], tuple[Tensor, Tensor]]], nbytes: int) -> Work:
    """Record each of these launches, and run one after the other."""
    recorded = []
    with torch.no_grad(), torch.inference_mode(False):
        for launch in launches:
            launch()  # compiled and loaded
            with capture(torch.device("cpu")) as graph:
                out, _ = launch()
            recorded.append((graph.replay, out))
    turns = cycle(replay for replay, _ in recorded)

    def output() -> Tensor:
        for replay, _ in recorded:
            replay()
        return recorded[0][1]

    return Work(call=lambda: next(turns)(), output=output, read_bytes=nbytes)


def _plain_heads(inputs: Heads) -> Work:
    from bitnet_triton.kernels.flash_attention.decode import launch_decode

    q, scale = inputs.q, inputs.q.shape[-1] ** -0.5
    held = [t[None].transpose(1, 2) for t in (inputs.k, inputs.v)]  # views: a head in a row
    nbytes = inputs.k.nbytes + inputs.v.nbytes

    def launch_over(k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: launch_decode(q, k, v, mask=_MASK, scale=scale)

    copies = [[_copied(t) for t in held] for _ in range(_copies(nbytes))]
    return _in_turns([launch_over(*copy) for copy in copies], nbytes)


def _coded_heads(bits: int) -> Callable[[Heads], Work]:
    def build(inputs: Heads) -> Work:
        from bitnet_triton.kernels.quantised_attention.forward import launch_quantised_attention

        q, (Hk, T, D) = inputs.q, inputs.k.shape
        made = KeyValueCodes.empty(1, Hk, T // 64, D, bits, q.device, rotate=True)
        made.write(0, 0, inputs.k, inputs.v)
        used = torch.full((1,), T, dtype=torch.int32, device=q.device)
        nbytes = sum(t.nbytes for t in made.tensors().values())

        def launch_over(codes: KeyValueCodes) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: launch_quantised_attention(q, codes, used, scale=D**-0.5)

        copies = [made.changed(_copied) for _ in range(_copies(nbytes))]
        return _in_turns([launch_over(codes) for codes in copies], nbytes)

    return build


def _copied(t: Tensor) -> Tensor:
    """Return a copy that lies as caches have it: in huge pages, where the system grants them."""
    return in_huge_pages(torch.empty_like(t)).copy_(t)


def _copies(nbytes: int) -> int:
    return max(2, -(-_COPIES_BYTES // nbytes))


def _plain_layers(inputs: page_steps.Inputs) -> Work:
    steps = page_steps.Steps(inputs, page_steps.plain_cache(inputs))
    held = sum(k.nbytes + v.nbytes for k, v in inputs.held)
    return Work(steps, lambda: steps.first, read_bytes=held + page_steps.layer_bytes(inputs))


def _coded_layers(bits: int) -> Callable[[page_steps.Inputs], Work]:
    def build(inputs: page_steps.Inputs) -> Work:
        kind = Quantised(bits=bits)
        cache = page_steps.filled(Cache([kind.memory() for _ in inputs.held]), inputs)
        steps = page_steps.Steps(inputs, cache)
        held = [t for layer in cache.layers for t in layer.codes.tensors().values()]  # type: ignore[attr-defined]
        read = sum(t.nbytes for t in held) + page_steps.layer_bytes(inputs)
        return Work(steps, lambda: steps.first, read_bytes=read)

    return build


def _either(heads: Callable[[Any], Work], layers: Callable[[Any], Work]) -> Callable[[Any], Work]:
    return lambda inputs: (heads if isinstance(inputs, Heads) else layers)(inputs)


def _inputs(of: str, T: int, settings: Settings) -> Heads | page_steps.Inputs:
    if of != "attention":
        return page_steps.make_inputs(of, "bf16", T, settings)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=settings.generator).bfloat16()

    return Heads(randn(1, 1, _H, _D), randn(_HK, T, _D), randn(_HK, T, _D))


def _flops(of: str, T: int) -> float:
    if of != "attention":
        return page_steps.flops(of, "bf16", T)
    return 4.0 * _H * _D * T


def case() -> Case:
    """Return the case."""
    return Case(
        name="code_steps",
        title="Decode steps over codes",
        grid=[{"of": of, "T": T} for of in ("attention", "2b4t") for T in (4096, 16384)],
        inputs=_inputs,
        reference=lambda inputs: inputs.reference(),
        # codes stand for other keys and values: by so much results differ where these are random
        providers={
            "plain": Provider("bfloat16", _either(_plain_heads, _plain_layers), 2e-2),
            "int8": Provider("codes of 8 bits", _either(_coded_heads(8), _coded_layers(8)), 0.1),
            "int4": Provider("codes of 4 bits", _either(_coded_heads(4), _coded_layers(4)), 0.5),
        },
        baselines=("plain",),
        flops=_flops,
        panels=((), ("of",)),
    )
