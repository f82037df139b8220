"""A cache that another attention has filled: it serves, to the logits, or is refused by name."""

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.models.bitnet.planned import build_cache, named_cache

T = 40
STREAMING = {"mode": "streaming", "window": 8, "sinks": 2}
DROPPING = {
    "sliding": {"mode": "sliding", "window": 8},
    "sinks": {"mode": "sliding", "window": 8, "sinks": 2},
    "streaming": STREAMING,
    "linear": "linear",
}
CHOOSING = {
    "h2o": {"name": "h2o", "budget": 12},
    "latest": {"name": "latest", "budget": 12},
    "snapkv": {"name": "snapkv", "budget": 12, "window": 8},
    "kvzip": {"name": "kvzip", "budget": 12, "least": 16},
    "quantised": {"name": "quantised", "recent": 64},
}

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def model(checkpoint):
    """Return a fused model whose attention a test changes."""
    return bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention="full").eval()


def filled(model, ids, memory=None):
    """Return a cache of the model's own kind, or of a memory by name, that has read ``ids``."""
    layers = model.config.num_hidden_layers
    cache = build_cache(model.attention_plan, layers)
    if memory is not None:
        cache = named_cache(model, memory)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, prompt_len=ids.shape[1])
    return cache


def go_on(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, prompt_len=T).logits


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("name", DROPPING)
def test_what_was_dropped_is_missed_by_name(name, new, model, token_ids):
    ids = token_ids(2, T + new)
    bt.set_attention(model, DROPPING[name])
    cache = filled(model, ids[:, :T])
    bt.set_attention(model, "full")
    for _ in range(3):  # no step is recorded either
        with pytest.raises(ValueError, match=r"layer 0 keeps .* its attention reads everything"):
            go_on(model, cache, ids[:, T:])


@pytest.mark.parametrize("name", DROPPING)
def test_a_model_without_a_plan_reads_everything(name, model, checkpoint, token_ids):
    ids = token_ids(1, T + 1)
    bt.set_attention(model, DROPPING[name])
    cache = filled(model, ids[:, :T])
    plain = bt.BitNetForCausalLM.from_pretrained(checkpoint()).eval()
    with pytest.raises(ValueError, match=r"Layer goes with `config.attention`"):
        plain(ids[:, T:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("memory", CHOOSING)
def test_modes_that_go_by_places_refuse_chosen_rows(memory, model, token_ids):
    ids = token_ids(1, T + 1)
    cache = filled(model, ids[:, :T], CHOOSING[memory])
    for attention in (DROPPING["sliding"], STREAMING, "lsh_sampling", {"mode": "top_k", "keys": 3}):
        bt.set_attention(model, attention)
        with pytest.raises(ValueError, match="goes by the places of keys"):
            go_on(model, cache, ids[:, T:])


def test_positions_that_were_counted_anew_are_refused(model, token_ids, monkeypatch):
    monkeypatch.setattr("bitnet_triton.cache.streaming.REBASE_EVERY", 16)
    ids = token_ids(1, T + 1)
    bt.set_attention(model, STREAMING)
    cache = filled(model, ids[:, : T - 2])
    go_on(model, cache, ids[:, T - 2 : T])
    assert cache.layers[0].shift is not None
    bt.set_attention(model, {"mode": "sliding", "window": 8, "sinks": 2})
    with pytest.raises(ValueError, match="layer 0 has counted positions anew"):
        go_on(model, cache, ids[:, T:])


@pytest.mark.parametrize("name", ["sliding", "sinks", "streaming"])
def test_a_cache_that_keeps_everything_serves_a_window(name, model, token_ids):
    """As if the prompt had been read in one attention, and the rest in the other, all along."""
    ids = token_ids(2, T + 1)
    cache = filled(model, ids[:, :T])
    bt.set_attention(model, DROPPING[name])
    found = go_on(model, cache, ids[:, T:])
    bt.set_attention(model, {"prefill": "full", "decode": DROPPING[name]})
    expected = go_on(model, filled(model, ids[:, :T]), ids[:, T:])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_larger_window_serves_a_smaller_one(model, token_ids):
    ids = token_ids(2, T + 1)
    attention = {"prefill": {"mode": "sliding", "window": 12}, "decode": DROPPING["sliding"]}
    bt.set_attention(model, attention["prefill"])
    cache = filled(model, ids[:, :T])
    bt.set_attention(model, attention["decode"])
    found = go_on(model, cache, ids[:, T:])
    bt.set_attention(model, attention)
    expected = go_on(model, filled(model, ids[:, :T]), ids[:, T:])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
