"""The ternary linear between one row and many: the time of a token over the tokens of a batch.

Kernels for one row and kernels for many are different ones, and where one takes over from the
other there may be a cliff: a batch that takes longer than a larger one. The time of a token has to
fall with the size of the batch. Providers are those of ternary_linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bench.case import Case, Provider, Work
from bench.cases import ternary_linear
from bench.cases.ternary_linear import SHAPES, Inputs

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def _by_token(build: Callable[[Inputs], Work]) -> Callable[[Inputs], Work]:
    def counted(inputs: Inputs) -> Work:
        return dataclasses.replace(build(inputs), units=inputs.x.shape[0])

    return counted


def _provider(provider: Provider, is_default: bool) -> Provider:
    return dataclasses.replace(provider, build=_by_token(provider.build), default=is_default)


def case() -> Case:
    """Return the case."""
    linear = ternary_linear.case()
    return dataclasses.replace(
        linear,
        name="small_batches",
        title="Ternary linear, small batches",
        grid=[
            {"M": M, "cache": cache, "K": K, "N": N}
            for cache, shapes in (("cold", SHAPES), ("hot", SHAPES[1:2]))
            for K, N in shapes
            for M in ROWS
        ],
        providers={
            name: _provider(provider, name in ("bitnet_triton", "torch_bf16"))
            for name, provider in linear.providers.items()
        },
        baselines=("torch_bf16",),
        unit="tokens",
        panels=(("cache",), ("K", "N")),
        curve="M",
    )
