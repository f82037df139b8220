"""A static cache gives what no cache gives: prompts at once and in parts, steps, padding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import bitnet_triton
from bitnet_triton import use_ternary_kernels
from bitnet_triton.models import BitNetForCausalLM

pytestmark = pytest.mark.usefixtures("default_backend")

T = 10
# how many tokens each call gets
PARTS = [(T,), (4, 6), (6, 1, 1, 1, 1), (1,) * T]
WAYS = ["from_pretrained", "use_ternary_kernels", "enable", "llama"]


def load(checkpoint, way, implementation="sdpa"):
    """Return a fused model, as ``way`` gives it."""
    kwargs = {"attn_implementation": implementation}
    if way == "from_pretrained":
        return BitNetForCausalLM.from_pretrained(checkpoint(), **kwargs).eval()
    if way == "enable":
        bitnet_triton.enable()
        try:
            return AutoModelForCausalLM.from_pretrained(checkpoint(), **kwargs).eval()
        finally:
            bitnet_triton.disable()
    arch = "llama" if way == "llama" else "bitnet"
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint("bitlinear", arch=arch), **kwargs)
    return use_ternary_kernels(theirs).eval()


@torch.no_grad()
def read(model, ids, cache, parts, mask=None):
    """Return the logits of ``ids`` [B T], read in parts of so many tokens."""
    logits, end = [], 0
    for part in parts:
        start, end = end, end + part
        kwargs = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            kwargs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(ids[:, start:end], past_key_values=cache, **kwargs).logits)
    return torch.cat(logits, 1)


def static(model, slots):
    return StaticCache(config=model.config, max_cache_len=slots)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "bitnet_triton"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_without_a_cache(checkpoint, steady_ids, error, way, implementation):
    model = load(checkpoint, way, implementation)
    ids = steady_ids(model, B=2, T=T)
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits

    for slots in (T, T + 1, T + 40):
        for parts in PARTS:
            logits = read(model, ids, static(model, slots), parts)
            assert error(logits, alone) < 2e-5, (slots, parts)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "bitnet_triton"])
@pytest.mark.parametrize("way", WAYS)
def test_padded_rows_are_what_they_are_alone(checkpoint, steady_ids, error, way, implementation):
    model, left = load(checkpoint, way, implementation), 4
    ids = steady_ids(model, B=2, T=T)
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :left], padded[1, left:], mask[1, :left] = 0, ids[1, : T - left], 0

    for parts in PARTS:
        logits = read(model, padded, static(model, T + 6), parts, mask)
        assert error(logits[0], alone[0]) < 2e-5, parts
        assert error(logits[1, left:], alone[1, : T - left]) < 2e-5, parts
