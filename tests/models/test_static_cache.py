"""A static cache gives what no cache gives: prompts at once and in parts, steps, padding."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    StaticSlidingWindowLayer,
)

import bitnet_triton as bt
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
        bt.enable()
        try:
            return AutoModelForCausalLM.from_pretrained(checkpoint(), **kwargs).eval()
        finally:
            bt.disable()
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


@pytest.mark.parametrize(
    "layer", [lambda: StaticSlidingWindowLayer(T + 6, 8), lambda: DynamicSlidingWindowLayer(8)]
)
def test_sliding_layers_that_hold_the_window_serve_it(checkpoint, steady_ids, error, layer):
    plan = {"mode": "sliding", "window": 4}
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan).eval()
    ids = steady_ids(model, B=2, T=T)
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
    for parts in PARTS:
        assert error(read(model, ids, Cache([layer(), layer()]), parts), alone) < 2e-5, parts


@pytest.mark.parametrize(
    ("plan", "reads"),
    [
        ("full", "reads everything"),
        (
            {"mode": "sliding", "window": 5},
            "keeps 3 of the latest tokens, its attention reads 4 of the latest tokens;",
        ),
        ({"mode": "streaming", "window": 3, "sinks": 2}, "and 2 of the first tokens"),
        ({"prefill": "full", "decode": {"mode": "sliding", "window": 3}}, "reads everything"),
    ],
    ids=str,
)
def test_sliding_layers_that_drop_what_is_read_are_refused(checkpoint, token_ids, plan, reads):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan).eval()
    cache = Cache([StaticSlidingWindowLayer(T + 6, 4) for _ in range(2)])
    with pytest.raises(ValueError, match=f"`past_key_values`: layer 0 .*{reads}"):
        model(token_ids(2, T), past_key_values=cache)


def generate(model, prompt, **kwargs):
    return model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("plan", [None, "full", {"mode": "sliding", "window": 6, "sinks": 2}])
def test_a_compiled_static_cache_writes_the_same_tokens(plan):
    model = BitNetForCausalLM.from_pretrained(
        bt.TINY_MODEL, attention=plan, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    texts = ["import os\nimport sys\n\ndef main(", "class A:\n    def __init__(self"]
    prompt = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    expected = generate(model, prompt)

    static = {"cache_implementation": "static"}
    assert torch.equal(generate(model, prompt, **static), expected)
    graphs = []

    def count(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph

    compiled = CompileConfig(backend=count, fullgraph=True)
    compiled._compile_all_devices = True  # not only where it pays
    assert torch.equal(generate(model, prompt, compile_config=compiled, **static), expected)
    assert graphs
    torch.compiler.reset()


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers 5.17 has no fp8 cache"
)
@pytest.mark.parametrize("parts", PARTS[:2], ids=str)
def test_a_quantised_cache_stays_as_near_as_without_fusing(checkpoint, steady_ids, error, parts):
    model = load(checkpoint, "from_pretrained")
    ids = steady_ids(model, B=2, T=T)

    def off():
        cache = Cache([cache_utils.Fp8QuantizedLayer() for _ in range(2)])
        return error(read(model, ids, cache, parts), alone)

    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
    fused = off()
    bt.unfuse(model)
    assert fused < 1.5 * off() + 2e-5
