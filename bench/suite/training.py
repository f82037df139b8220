"""Forward and backward of the trainable linear, beside the same step of a linear in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.cases import bit_linear
from bench.suite import speed
from bench.suite.plan import Item, Plan


def items(plan: Plan) -> Sequence[Item]:
    """Return steps of the widest linear of the published 2B model, as autograd starts them."""
    tokens, K, N = ((24,), 64, 32) if plan.small else ((8192, 2048), 2560, 6912)
    grid = [{"passes": "forward+backward", "M": M, "K": K, "N": N} for M in tokens]
    case = bit_linear.case()
    dense = dataclasses.replace(case.providers["torch_bf16"], label="F.linear bf16")
    case = dataclasses.replace(
        case,
        name="training",
        title="A training step",
        grid=grid,
        providers={speed.OURS: case.providers["bitnet_triton"], "bf16": dense},
        baselines=("bf16",),
    )
    return speed.items(case, plan, quick=grid[:1])
