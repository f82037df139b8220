"""One query a sequence against a long cache: bound by the bandwidth of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Provider, Settings, Work
from bench.suite import speed
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import Mask, flash_attention

_TOLERANCE = 8e-3


@dataclass(frozen=True)
class Inputs:
    """One point: q [B H 1 D], and caches k and v [B Hk T D], one pair for each call."""

    q: Tensor
    caches: list[tuple[Tensor, Tensor]]

    def work(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
        """Return calls of ``attend(q, k, v)``, each with a cache of its own."""
        calls = [lambda k=k, v=v: attend(self.q, k, v) for k, v in self.caches]
        moved = 2 * self.q.nbytes + 2 * self.caches[0][0].nbytes
        return speed.in_turn(calls, self.q.device, read_bytes=moved)


def _calls(B: int, T: int, Hk: int, D: int, device: torch.device) -> int:
    return speed.calls_beyond_cache(2 * B * Hk * T * D * torch.bfloat16.itemsize, device)


def _inputs(B: int, T: int, H: int, Hk: int, D: int, settings: Settings) -> Inputs:
    random = settings.generator

    def randn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=settings.device)
        return values.to(settings.dtype)

    caches = [
        (randn(B, Hk, T, D), randn(B, Hk, T, D))
        for _ in range(_calls(B, T, Hk, D, settings.device))
    ]
    return Inputs(randn(B, H, 1, D), caches)


def _reference(inputs: Inputs) -> Tensor:
    q, (k, v) = inputs.q.double(), inputs.caches[-1]
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _ours(inputs: Inputs) -> Work:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attention(q, k, v, mask=Mask()).transpose(1, 2)

    return inputs.work(attend)


def _sdpa(inputs: Inputs) -> Work:
    return inputs.work(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])
    )


def items(plan: Plan) -> Sequence[Item]:
    """Return the attention of the published 2B model, one sequence and many."""
    heads = {"H": 4, "Hk": 2, "D": 32} if plan.small else {"H": 20, "Hk": 5, "D": 128}
    sizes = [(1, 300)] if plan.small else [(1, 4096), (1, 32768), (16, 4096), (1, 131072)]
    grid = [{"B": B, "T": T, **heads} for B, T in sizes]
    case = Case(
        name="decode",
        title="Attention of one query",
        grid=grid,
        inputs=_inputs,
        reference=_reference,
        providers={
            speed.OURS: Provider("bitnet_triton", _ours, _TOLERANCE),
            "sdpa": Provider("SDPA", _sdpa, _TOLERANCE, note="the backend that PyTorch chooses"),
        },
        baselines=("sdpa",),
        flops=lambda B, T, H, Hk, D: 4 * B * T * H * D * _calls(B, T, Hk, D, plan.device),
    )
    return speed.items(case, plan, quick=grid[-1:] if plan.small else grid[1:2])
