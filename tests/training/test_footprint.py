"""What is read and held is counted, not taken from the settings of a mode."""

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import AttentionPlan, Mode
from bitnet_triton.attention.blocks import BlockMode
from bitnet_triton.attention.modes.indexed_blocks import IndexedBlocks
from bitnet_triton.attention.modes.native_sparse import NativeSparse
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.modes.top_k import TopK
from bitnet_triton.attention.sampled import SamplingMode
from bitnet_triton.cache.memory import tensors_in
from bitnet_triton.kernels import HashTables, Mask
from bitnet_triton.kernels.lsh_sampling.reference import hash_reference
from bitnet_triton.training.footprint import bytes_held, measure_footprint
from bitnet_triton.training.settings import make_cache

T = 200
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip


def build(attention):
    return bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention=attention)).eval()


def footprint(attention):
    return measure_footprint(build(attention), torch.randint(1, 64, (1, T)))


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


def test_codes_of_a_memory_count_as_read():
    model = build("full")
    found = measure_footprint(
        model, torch.randint(1, 64, (1, 300)), make_cache("quantised:recent=64", model, 300)
    )
    assert found.rows_prompt == 299
    assert found.rows_decode == found.scored_decode == 300


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
    assert measure_footprint(model, torch.randint(1, 64, (1, T))).rows_decode == T


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
    model, ids = build({"mode": "sliding", "window": 48}), torch.randint(1, 64, (1, T))
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
    cache = build("full")(torch.randint(1, 64, (1, 30)), use_cache=True).past_key_values
    layer = cache.layers[0]
    before = bytes_held(cache)
    layer.view_of_keys = layer.keys[..., :5, :]
    assert bytes_held(cache) == before
    layer.table = {"codes": [torch.zeros(100, dtype=torch.int8)]}
    assert bytes_held(cache) == before + 100


def test_counting_leaves_no_trace():
    model, ids = build("full"), torch.randint(1, 64, (1, 40))
    before = model(ids).logits
    measure_footprint(model, ids)
    assert torch.equal(model(ids).logits, before)


BLOCKS = [
    {"mode": "pooled_blocks", "block": 16, "selected": 3},
    {"mode": "quest", "page": 8, "budget": 32},
    {"mode": "quest", "page": 8, "budget": 32, "per_head": True},
    {"mode": "indexed_blocks", "block": 16, "selected": 3},
]


@pytest.mark.parametrize("attention", BLOCKS, ids=str)
def test_what_a_mode_of_blocks_counts_is_what_trying_finds(attention, monkeypatch):
    """Its count, and the count without one, which watches the output."""
    model, ids = build(attention), torch.randint(1, 64, (1, T))
    counted = measure_footprint(model, ids)
    monkeypatch.setattr(BlockMode, "reads", Mode.reads)
    # what it has learned of the tokens of the call would be learned again at each trial
    monkeypatch.setattr(IndexedBlocks, "remember", remember_once(IndexedBlocks.remember))
    tried = measure_footprint(model, ids)
    assert [counted.rows_prompt, counted.rows_decode] == [tried.rows_prompt, tried.rows_decode]
    assert counted.rows_decode < counted.scored_decode


def remember_once(remember):
    seen = {}

    def once(self, k, context):
        tokens = context.memory.get_seq_length()
        if seen.get(id(context.memory)) != tokens:
            remember(self, k, context)
        seen[id(context.memory)] = tokens

    return once


def test_units_that_choose_count_as_scored():
    found = footprint({"mode": "pooled_blocks", "block": 16, "selected": 3})
    assert found.rows_decode == 2 * 16 + T % 16
    assert found.scored_decode == found.rows_decode + T // 16


def test_native_sparse_counts_compressed_blocks_and_tokens_that_are_chosen_or_near():
    sizes = {"block": 8, "stride": 4, "selection": 8, "selected": 3, "initial": 1, "local": 1}
    found = footprint({"mode": "native_sparse", **sizes, "window": 20})
    compressed, window = (T - 8) // 4 + 1, 20
    # the first block and one that was found lie outside of the window, the latest one in it
    assert compressed + window + 8 <= found.rows_decode <= compressed + window + 16
    near = footprint({"mode": "native_sparse", **sizes, "window": T})
    assert near.rows_decode == compressed + T


def test_native_sparse_reads_no_token_that_it_does_not_count(monkeypatch):
    """With gates that shut the compressed branch, trying finds the tokens of the other two."""
    model = build(
        {"mode": "native_sparse", "block": 8, "stride": 4, "selection": 8, "selected": 3,
         "initial": 1, "local": 1, "window": 20}
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("gates.bias"):
            parameter.data.view(-1, 3)[:, 0] = -torch.inf
    ids = torch.randint(1, 64, (1, T))
    counted = measure_footprint(model, ids)
    monkeypatch.setattr(NativeSparse, "reads", Mode.reads)
    assert counted.rows_decode - ((T - 8) // 4 + 1) == measure_footprint(model, ids).rows_decode


def test_a_memory_tells_what_it_keeps_in_objects_of_its_own():
    cache = build("full")(torch.randint(1, 64, (1, 30)), use_cache=True).past_key_values
    before = bytes_held(cache)
    hidden = torch.zeros(50)
    cache.layers[0].tensors = lambda: [*tensors_in(vars(cache.layers[0])), hidden]
    assert bytes_held(cache) == before + 200


def test_counting_a_mode_with_a_memory_of_its_own_leaves_no_trace():
    model = build({"mode": "indexed_blocks", "block": 16, "selected": 3})
    ids = torch.randint(1, 64, (1, T))
    with torch.no_grad():
        before = model(ids).logits
        cache = model(ids[:, :-2], use_cache=True).past_key_values
        measure_footprint(model, ids)
        one = model(ids[:, -2:], past_key_values=cache).logits
    assert torch.allclose(one, before[:, -2:], atol=1e-4)


LSH = {"mode": "lsh_sampling", "bits": 3, "tables": 8, "sinks": 3, "recent": 10}
VERIFIED = {"mode": "verified_sampling", "page": 8, "selected": 6, "base": 9, "epsilon": 0.9}
SAMPLED = [LSH, {**LSH, "share": "union"}, {**LSH, "share": "proposal"}, VERIFIED]


@pytest.mark.parametrize("attention", SAMPLED, ids=str)
def test_what_a_sampling_mode_counts_is_what_trying_finds(attention, monkeypatch):
    model, ids = build(attention), torch.randint(1, 64, (1, T))
    counted = measure_footprint(model, ids)
    monkeypatch.setattr(SamplingMode, "reads", Mode.reads)
    tried = measure_footprint(model, ids)
    assert counted.rows_prompt == T - 1  # the prompt reads everything
    assert counted.rows_decode == pytest.approx(tried.rows_decode)
    assert counted.rows_decode < min(0.8 * T, counted.scored_decode)


def test_tables_count_as_memory():
    model, ids = build(LSH), torch.randint(1, 64, (1, T))
    full = footprint("full").cache_bytes
    tables = 2 * 2 * 8 * T * 2  # of two layers and two heads, 16 bits a row and table
    assert measure_footprint(model, ids).cache_bytes > full + tables


def test_looked_up_rows_are_those_of_the_buckets():
    k, q = torch.randn(2, 90, 2, 16), torch.randn(2, 1, 4, 16)
    tables = HashTables.build(k[:, :80], bits=3, tables=8)
    tables.append(k[:, 80:])
    codes = hash_reference(k - tables.centre[:, None], tables.planes)[:, :80]  # [B T Hk L]
    asked = hash_reference(q[:, 0], tables.planes)  # [B H L]
    for head in range(4):
        met = codes[:, :, head // 2] == asked[:, head, None]
        found = tables.looked_up(q)[:, head]
        assert torch.equal(found, met.sum((1, 2)) + 10)
    parts = [
        codes[:, :, 0, :4] == asked[:, 0, None, :4],
        codes[:, :, 0, 4:] == asked[:, 1, None, 4:],
    ]
    expected = sum(part.sum((1, 2)) for part in parts) + 10
    assert torch.equal(tables.looked_up(q, share="union")[:, 0], expected)


@pytest.mark.parametrize("decode", ["full", {"mode": "sliding", "window": 16}], ids=str)
def test_a_static_cache_tells_on_the_device_which_token_was_generated(decode):
    model = build({"prefill": "full", "decode": decode})
    ids = torch.randint(1, 64, (1, T))
    own, static = (
        measure_footprint(model, ids, make_cache(kind, model, T)) for kind in ("own", "static")
    )
    assert (static.rows_prompt, static.rows_decode) == (own.rows_prompt, own.rows_decode)
