"""Packed ternary products: many tokens, bound by arithmetic, and few, bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Point, Provider, Settings, Work
from bench.suite import speed
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import (
    TernaryWeight,
    quantize_activations,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.kernels.quantize.reference import quantize_activations_reference

# (K, N): the linears of BitNet b1.58 2B-4T, merged where they share an input; of larger models
_SHAPES = ((2560, 6912), (6912, 2560), (2560, 3840), (2560, 13824), (2560, 2560))
_LARGE = ((4096, 14336), (14336, 4096))
_LARGER = (8192, 28672)
_SMALL = ((64, 32), (96, 64))
_TOKENS = 4096
_ROWS = (1, 2, 4, 8, 16)
_FEWER_ROWS = (1, 4, 16)
_OWN_TOLERANCE = 8e-3
# peers do not quantise the activations
_PEER_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Inputs:
    """Activations x [M, K], weights as codes [N, K] and a scale, and the calls of one timing."""

    x: Tensor
    codes: Tensor
    scale: float
    calls: int

    def work(
        self, make: Callable[[], Any], held_bytes: int, run: Callable[[Any], Tensor], **more: Any
    ) -> Work:
        """Return calls of ``run(weight)`` that go round over copies of the weight."""
        N = self.codes.shape[0]
        copies = min(self.calls, speed.calls_beyond_cache(held_bytes, self.x.device))
        weights = [make() for _ in range(copies)]
        calls = [lambda w=weights[i % copies]: run(w) for i in range(self.calls)]
        moved = self.x.nbytes + self.x.shape[0] * N * self.x.element_size()
        return speed.in_turn(calls, self.x.device, read_bytes=held_bytes + moved, **more)


def _calls(M: int, K: int, N: int, device: torch.device) -> int:
    """Return how many calls one timing makes; the same for all, or ratios would mean nothing."""
    # with many tokens no weight is bound to stay in a cache, and launches are far apart
    return 2 if max(_ROWS) < M else speed.calls_beyond_cache(K * N // 4, device)


def _inputs(M: int, K: int, N: int, settings: Settings) -> Inputs:
    random: dict[str, Any] = {"generator": settings.generator, "device": settings.device}
    x = torch.randn((M, K), **random).to(settings.dtype)
    codes = torch.randint(-1, 2, (N, K), dtype=torch.int8, **random)
    return Inputs(x, codes, K**-0.5, _calls(M, K, N, settings.device))


def _reference(inputs: Inputs) -> Tensor:
    codes, scale = quantize_activations_reference(inputs.x.float())
    return (codes.double() @ inputs.codes.double().t()) * scale.double() * inputs.scale


def _packed(inputs: Inputs) -> TernaryWeight:
    return TernaryWeight.from_codes(inputs.codes, inputs.scale)


def _ours(inputs: Inputs) -> Work:
    held = inputs.codes.numel() // 4
    return inputs.work(lambda: _packed(inputs), held, lambda w: ternary_linear(inputs.x, w))


def _ours_quantized(inputs: Inputs) -> Work:
    codes, scale = quantize_activations(inputs.x)
    sums, dtype = codes.sum(-1, dtype=torch.int32), inputs.x.dtype
    return inputs.work(
        lambda: _packed(inputs),
        inputs.codes.numel() // 4,
        lambda w: ternary_linear_quantized(codes, scale, sums, w, dtype=dtype),
    )


def _dense(inputs: Inputs) -> Work:
    weight = inputs.codes.to(inputs.x.dtype) * inputs.scale
    return inputs.work(weight.clone, weight.nbytes, lambda w: F.linear(inputs.x, w))


def _int_mm(inputs: Inputs) -> Work:
    if inputs.x.device.type == "cuda" and inputs.x.shape[0] <= 16:
        raise PeerMissingError("torch._int_mm takes more than 16 rows on a GPU")
    codes, scale = quantize_activations(inputs.x)
    return inputs.work(
        inputs.codes.clone,
        inputs.codes.nbytes,
        lambda w: torch._int_mm(codes, w.t()),
        finish=lambda y: y.double() * scale.double() * inputs.scale,
    )


def _case(name: str, title: str, grid: Sequence[Point], device: torch.device) -> Case:
    own, peer = _OWN_TOLERANCE, _PEER_TOLERANCE
    return Case(
        name=name,
        title=title,
        grid=grid,
        inputs=_inputs,
        reference=_reference,
        providers={
            speed.OURS: Provider("bitnet_triton", _ours, own, "int8", "quantises x as well"),
            "bitnet_triton_quantized": Provider(
                "bitnet_triton, x quantised", _ours_quantized, own, "int8",
                "as after a norm that quantises",
            ),
            "bf16": Provider("F.linear bf16", _dense, peer, "bf16", "x is not quantised"),
            "int_mm": Provider(
                "torch._int_mm", _int_mm, own, "int8", "int8 weights, x quantised, int32 sums only"
            ),
        },
        baselines=("bf16", "int_mm"),
        flops=lambda M, K, N: 2 * M * K * N * _calls(M, K, N, device),
    )  # fmt: skip


def prefill(plan: Plan) -> Sequence[Item]:
    """Return products of 4096 tokens; few on a CPU."""
    M, shapes = (24, _SMALL) if plan.small else (_TOKENS, (*_LARGE[:1], *_SHAPES, *_LARGE[1:]))
    grid = [{"M": M, "K": K, "N": N} for K, N in shapes]
    case = _case("prefill", "Prefill", grid, plan.device)
    return speed.items(case, plan, quick=grid[:2])


def gemv(plan: Plan) -> Sequence[Item]:
    """Return products of 1 to 16 tokens, with weights that come from memory; the largest first."""
    shapes = _SMALL[:1] if plan.small else (*_LARGE, _LARGER)
    grid = [{"M": M, "K": K, "N": N} for M in _ROWS for K, N in shapes]
    if not plan.small:
        grid += [{"M": M, "K": K, "N": N} for M in _FEWER_ROWS for K, N in _SHAPES]
    case = _case("gemv", "Few tokens", grid, plan.device)
    quick = [p for p in grid if p["M"] in (1, 16) and (p["K"], p["N"]) == shapes[0]]
    return speed.items(case, plan, quick=quick)
