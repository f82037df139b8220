"""torch.compile layer by layer, with a cache: the graphs of one layer serve all of them."""

import pytest
import torch
from torch._dynamo.utils import counters

import bitnet_triton as bt
from bitnet_triton.cache import GrowingLayer
from bitnet_triton.models.fused.layer import FusedDecoderLayer

LAYERS = 6


@pytest.fixture
def model():
    config = bt.BitNetConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
        quantization_config={
            "quant_method": "bitnet", "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    )  # fmt: skip
    model = bt.BitNetForCausalLM(config).eval()
    for layer in model.modules():
        if isinstance(layer, bt.nn.PackedBitLinear):
            codes = torch.randint(-1, 2, (layer.out_features, layer.in_features), dtype=torch.int8)
            layer.weight = bt.kernels.TernaryWeight.from_codes(codes, 1.0).packed
            layer.weight_scale.fill_(0.1)
    yield bt.fuse(model)
    torch.compiler.reset()


def step_by_step(model, ids):
    """Logits of a prompt of five tokens, and of one token after another."""
    cache, logits = None, []
    with torch.no_grad():
        for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    return torch.cat(logits, dim=1)


@torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True)
def test_no_layer_wants_graphs_of_its_own(model):
    ids = torch.randint(3, 64, (1, 9))
    expected = step_by_step(model, ids)
    torch.compiler.reset()
    counters.clear()
    layers = model.model.layers
    assert all(isinstance(layer, FusedDecoderLayer) for layer in layers)
    for layer in layers:
        layer.compile(backend="eager")
    got = step_by_step(model, ids)
    assert counters["frames"]["ok"] > 0  # they were traced
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
