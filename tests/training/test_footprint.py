"""What is read and held is found by trying it out, not by asking the mode."""

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.modes.top_k import TopK
from bitnet_triton.kernels import Mask
from bitnet_triton.training.footprint import bytes_held, measure_footprint

T = 200
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip


def build(attention):
    return bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention=attention)).eval()


def footprint(attention):
    return measure_footprint(build(attention), torch.randint(64, (1, T)))


def claimed(attention):
    """Return how many keys the masks of a plan show to the last token of a prompt and behind it."""
    plan, rows = AttentionPlan.from_config(attention, 2), []
    for phase, length in (("prefill", T - 1), ("decode", T)):
        masks = [plan.mode(layer, phase).mask for layer in range(2)]
        seen = [mask.visible(length)[..., -1, :].float().sum(-1).mean().item() for mask in masks]
        rows.append(sum(seen) / 2)
    return rows


MASKS = [
    "full",
    {"mode": "sliding", "window": 48},
    {"mode": "sliding", "window": 48, "sinks": 5},
    {"mode": "local", "block": 32},
    {"mode": "strided", "block": 16},
    {"mode": "fixed", "block": 16, "summary": 2},
    {"preset": "swaa-untrained", "window": 32, "sinks": 4},
    {"preset": "swaa-trained-fast", "window": 32},
]


@pytest.mark.parametrize("attention", MASKS, ids=str)
def test_rows_read_are_those_that_the_mask_shows(attention):
    found = footprint(attention)
    assert [found.rows_prompt, found.rows_decode] == claimed(attention)
    assert found.rows_decode <= found.scored_decode <= T


def test_longformer_reads_its_windows_by_head():
    found = footprint({"mode": "longformer", "window": [10, 20, 30, 40], "dilation": 2})
    assert found.rows_decode == 25


def test_streaming_reads_sinks_and_window():
    found = footprint({"mode": "streaming", "window": 48, "sinks": 4})
    assert found.rows_decode == 52


def test_selection_reads_what_it_chose_and_scores_everything():
    found = footprint({"mode": "top_k", "keys": 7})
    assert found.rows_decode == found.rows_prompt == 7
    assert found.scored_decode == T
    assert 1 <= footprint({"mode": "threshold", "share": 0.99}).rows_decode < T


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_weights_too_small_for_a_float_are_still_read(scale):
    model = build("full")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(scale)
    assert measure_footprint(model, torch.randint(64, (1, T))).rows_decode == T


def test_a_mode_that_reads_less_than_it_claims_is_found_out(monkeypatch):
    honest = {"mode": "sliding", "window": 48}
    # the claim is made with the honest mask, the model runs with half of the window
    expected = claimed(honest)
    monkeypatch.setattr(Sliding, "mask", property(lambda self: Mask(window=self.window // 2)))
    assert footprint(honest).rows_decode == expected[1] / 2


def test_a_mode_that_reads_more_than_it_claims_is_found_out(monkeypatch):
    run = TopK.__call__
    monkeypatch.setattr(TopK, "__call__", lambda self, *a: run(TopK(2 * self.keys), *a))
    assert footprint({"mode": "top_k", "keys": 8}).rows_decode == 16


def test_bytes_are_those_of_all_tensors_that_a_cache_holds():
    model, ids = build({"mode": "sliding", "window": 48}), torch.randint(64, (1, T))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    # with the room behind what is held
    tensors = [t for layer in cache.layers for t in layer.stores]
    assert bytes_held(cache) == sum(t.numel() * t.element_size() for t in tensors)
    # two key/value heads of 16 in float32, keys and values, two layers: window and some slack
    assert 47 <= bytes_held(cache) / (2 * 16 * 4 * 2 * 2) <= 47 + 16
    full = footprint("full").cache_bytes
    assert full >= T * 2 * 16 * 4 * 2 * 2 > 3 * bytes_held(cache)


def test_a_view_and_its_store_count_once():
    cache = build("full")(torch.randint(64, (1, 30)), use_cache=True).past_key_values
    layer = cache.layers[0]
    before = bytes_held(cache)
    layer.view_of_keys = layer.keys[..., :5, :]
    assert bytes_held(cache) == before
    layer.table = {"codes": [torch.zeros(100, dtype=torch.int8)]}
    assert bytes_held(cache) == before + 100


def test_counting_leaves_no_trace():
    model, ids = build("full"), torch.randint(64, (1, 40))
    before = model(ids).logits
    measure_footprint(model, ids)
    assert torch.equal(model(ids).logits, before)
