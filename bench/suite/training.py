"""Forward and backward of the trainable linear, beside the same step of a linear in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.cases import bit_linear
from bench.suite import speed
from bench.suite.plan import Item, Plan


def items(plan: Plan) -> Sequence[Item]:
    """Return steps of the widest linear of the published 2B model, recorded and not."""
    tokens, K, N = ((24,), 64, 32) if plan.small else ((8192, 2048), 2560, 6912)
    grid = [{"passes": "forward+backward", "M": M, "K": K, "N": N} for M in tokens]
    case = bit_linear.case()
    ours, dense = case.providers["bitnet_triton"], case.providers["torch_bf16"]
    dense = dataclasses.replace(dense, label="F.linear bf16")
    case = dataclasses.replace(
        case,
        name="training",
        title="A training step",
        grid=grid,
        # from Python, launches take longer than what they start
        providers={
            speed.OURS: speed.recorded(ours, "bitnet_triton, recorded"),
            "bf16": speed.recorded(dense, "F.linear bf16, recorded"),
            "bitnet_triton_eager": ours,
            "bf16_eager": dense,
        },
        baselines=("bf16", "bf16_eager"),
    )
    return speed.items(case, plan, quick=grid[:1])
