"""The sections of ``python -m bench.gpu_suite``: first what is right, then how fast it is."""

import functools

from bench.suite import (
    attention,
    check_attention,
    check_linear,
    check_norm,
    decode,
    matmul,
    model,
    steps,
    training,
)
from bench.suite.plan import Section

SECTIONS = (
    Section("norms", "Quantisers and norms", "check", 6, 10, check_norm.items),
    Section("linears", "Linears", "check", 10, 10, check_linear.items),
    Section("attentions", "Attention and rotation", "check", 14, 10, check_attention.items),
    Section("overlap", "Decode steps whose kernels overlap", "check", 3, 15, steps.checks),
    Section("prefill", "Products of 4096 tokens", "speed", 6, 10, matmul.prefill),
    Section("gemv", "Products of 1 to 16 tokens", "speed", 6, 10, matmul.gemv),
    Section("training", "Training steps of a linear", "speed", 4, 10, training.items),
    Section(
        "attention", "Attention, forward", "speed", 4, 40,
        functools.partial(attention.attention, "forward"),
    ),
    Section(
        "attention_backward", "Attention, backward", "speed", 4, 60,
        functools.partial(attention.attention, "backward"),
    ),
    Section("decode", "Attention of one query", "speed", 3, 10, decode.items),
    Section("steps", "Layers of a decode step, recorded", "speed", 3, 15, steps.items),
    # one sequence; eight only if that was done in half of the time
    Section("model", "A whole model, decoding", "speed", 8, 60, model.items, most_s=120),
)  # fmt: skip

__all__ = ["SECTIONS"]
