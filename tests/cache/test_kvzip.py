"""A prompt that is read again: what each slot was given, what stays, and where it is refused."""

import copy

import pytest
import torch
from transformers.cache_utils import Cache

import bitnet_triton as bt
from bitnet_triton.cache import Attended, Call, GrowingLayer, SinkWindowLayer, parse_memory

QUIET = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


class Watching(GrowingLayer):
    """Keeps everything, and notes what the queries of its last call give to the prompt's keys."""

    given = None

    def after(self, attended):
        q, k = (t.double() for t in (attended.q, attended.k))
        _, Tq, H, D = q.shape
        k = k.repeat_interleave(H // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
        seen = torch.ones(Tq, k.shape[1], dtype=torch.bool).tril(k.shape[1] - Tq)
        self.given = scores.masked_fill(~seen, float("-inf")).softmax(-1)


def worth_by_hand(model, ids, parts):
    """Return keys [B H T D] of each layer, and the most that any query of the parts gave them."""
    T, layers = ids.shape[1], []
    cache = Cache([Watching() for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, prompt_len=T)
        most = [0] * len(cache.layers)
        for part in parts:
            model(part, past_key_values=cache, use_cache=True)
            for index, layer in enumerate(cache.layers):
                best = layer.given[..., :T].amax(2)
                most[index] = best.maximum(torch.as_tensor(most[index]))
            cache.crop(-part.shape[1])
    for layer, worth in zip(cache.layers, most):
        layers.append((layer.keys[:, :, :T], worth))
    return layers


@pytest.mark.parametrize("ask", [(), (11, 12, 13)])
def test_what_stays_is_what_a_second_reading_looks_at_most(ask, full_model):
    ids = torch.randint(10, 1000, (2, 90))
    front = torch.tensor(ask, dtype=torch.long).expand(2, -1)
    pieces = ids[:, :40], ids[:, 32:80], ids[:, 72:]  # 8 tokens of the part before lead on
    parts = [torch.cat([front, piece], 1) for piece in pieces]
    layers = worth_by_hand(full_model, ids, parts)
    kind = parse_memory({"name": "kvzip", "budget": 25, "part": 40, "ask": list(ask)})
    cache = Cache([kind.memory() for _ in layers])
    with torch.no_grad():
        full_model(ids, past_key_values=cache, use_cache=True, prompt_len=90)
    for memory, (keys, worth) in zip(cache.layers, layers):
        assert memory.get_seq_length() == 90
        same = (memory.keys[:, :, :, None] == keys[:, :, None]).all(-1)  # [B H kept T]
        assert bool((same.sum(-1) == 1).all())
        stays = same.any(2)
        assert bool((stays.sum(-1) == 25).all())
        assert bool(stays[..., :4].all())
        rest, gone = worth[..., 4:], ~stays[..., 4:]
        least = rest.masked_fill(gone, torch.inf).amin(-1)
        # float32 beside float64, where two are about equal
        assert bool((rest.masked_fill(~gone, 0).amax(-1) <= least * (1 + 1e-4)).all())


def test_nothing_of_the_second_reading_is_left(full_model):
    ids = torch.randint(10, 1000, (1, 90))
    memory = parse_memory({"name": "kvzip", "budget": 30})
    cache = Cache([memory.memory() for _ in range(full_model.config.num_hidden_layers)])
    with torch.no_grad():
        full_model(ids, past_key_values=cache, use_cache=True, prompt_len=90)
        for layer in cache.layers:
            assert layer.held == 30
            assert layer.get_seq_length() == 90
            # no store for what has gone: 1 row, 4 heads, 30 tokens of 64 numbers
            assert layer.keys.untyped_storage().nbytes() == 4 * 30 * 64 * 4
        full_model(ids[:, :1], past_key_values=cache, use_cache=True, prompt_len=90)
    assert {layer.held for layer in cache.layers} == {31}


@pytest.mark.parametrize("window", [0, 1])
def test_layers_with_a_window_beside_it_are_left_alone(window):
    """Whichever layer has the window; each part is read behind the prompt and no other part."""
    modes = ["full"] * 3
    modes[window] = {"mode": "sliding", "window": 17}
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention={"prefill": modes, "decode": modes}, dtype=torch.float32
    ).eval()
    ids, chosen = torch.randint(10, 1000, (1, 90)), [i for i in range(3) if i != window]
    plain = Cache([SinkWindowLayer(16) if i == window else Watching() for i in range(3)])
    kind = parse_memory({"name": "kvzip", "budget": 25, "part": 40})
    cache = Cache([SinkWindowLayer(16) if i == window else kind.memory() for i in range(3)])
    model(ids, past_key_values=cache, use_cache=True, prompt_len=90)  # with a graph
    with torch.no_grad():
        model(ids, past_key_values=plain, use_cache=True, prompt_len=90)
        most = {i: torch.zeros(()) for i in chosen}
        for part in (ids[:, :40], ids[:, 32:80], ids[:, 72:]):
            read = copy.deepcopy(plain)
            model(part, past_key_values=read, use_cache=True)
            most = {i: most[i].maximum(read.layers[i].given[..., :90].amax(2)) for i in chosen}
    beside, expected = cache.layers[window], plain.layers[window]
    assert beside.get_seq_length() == 90
    assert torch.equal(beside.keys, expected.keys)
    assert torch.equal(beside.values, expected.values)
    for i in chosen:
        keys, worth = plain.layers[i].keys, most[i][..., 4:]
        stays = (cache.layers[i].keys[:, :, :, None] == keys[:, :, None]).all(-1).any(2)
        assert bool((stays.sum(-1) == 25).all())
        assert bool(stays[..., :4].all())
        gone = ~stays[..., 4:]
        least = worth.masked_fill(gone, torch.inf).amin(-1)
        assert bool((worth.masked_fill(~gone, 0).amax(-1) <= least * (1 + 1e-4)).all())


def test_fewer_rows_may_be_kept_later(full_model):
    ids = torch.randint(10, 1000, (1, 90))

    def read(budget):
        kind = parse_memory({"name": "kvzip", "budget": budget})
        cache = Cache([kind.memory() for _ in range(full_model.config.num_hidden_layers)])
        with torch.no_grad():
            full_model(ids, past_key_values=cache, use_cache=True, prompt_len=90)
        return cache

    first, direct = read(40), read(20)
    for one, other in zip(first.layers, direct.layers):
        generated = one.keys[:, :, :3] + 1
        one.begin(Call(90, prompt_len=90))
        one._is_told = True
        one.update(generated, generated)
        one.shrink(20)
        assert one.held == 23
        assert one.keys.untyped_storage().nbytes() == 4 * 23 * 64 * 4
        assert torch.equal(one.keys[:, :, :20], other.keys)
        assert torch.equal(one.keys[:, :, 20:], generated)
        with pytest.raises(ValueError, match="expected 1 to 20 rows, got 21"):
            one.shrink(21)


@pytest.mark.parametrize("prompt", [70, 300])
def test_recorded_steps_do_what_others_do(prompt, full_model):
    """Behind a short prompt everything stays: bitwise the plain cache."""
    ids = torch.randint(10, 1000, (1, prompt))
    told = {**QUIET, "return_dict_in_generate": True, "output_logits": True}
    kind = {"name": "kvzip", "budget": 70}
    ours = full_model.generate(ids, **told, cache_implementation=kind)
    assert full_model.model.decode_steps.recording is not None
    assert {layer.held for layer in ours.past_key_values.layers} == {81}
    if prompt == 70:
        plain = full_model.generate(ids, **told)
        assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
        return
    cache = Cache([parse_memory(kind).memory() for _ in ours.past_key_values.layers])
    with torch.no_grad():
        calls = [ids, ours.sequences[:, prompt:-1]]
        logits = [
            full_model(call, past_key_values=cache, use_cache=True, prompt_len=prompt).logits
            for call in calls
        ]
    steps = torch.stack(ours.logits, 1)
    whole = torch.cat([logits[0][:, -1:], logits[1]], 1)
    # codes of activations may turn where one token is read at a time; a wrong row is off by more
    assert float((steps - whole).norm() / whole.norm()) < 0.05


def test_padding_is_refused(full_model):
    ids = torch.randint(10, 1000, (2, 90))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="'kvzip' reads a prompt again as it is, without padding"):
        full_model.generate(ids, attention_mask=mask, **QUIET, cache_implementation="kvzip")


def test_embeddings_are_refused(full_model):
    embedded = full_model.get_input_embeddings()(torch.randint(10, 1000, (1, 90)))
    with pytest.raises(ValueError, match="has a prompt read again, which needs `input_ids`"):
        full_model.generate(inputs_embeds=embedded, **QUIET, cache_implementation="kvzip")


def test_a_model_that_reads_nothing_again_is_refused():
    memory = parse_memory({"name": "kvzip", "budget": 10}).memory()
    q = torch.randn(1, 90, 2, 16)
    keys = q.transpose(1, 2)
    memory.begin(Call(0))
    memory.update(keys, keys)
    memory.after(Attended(q, q, torch.zeros(1, 2, 90), 0.25))
    with pytest.raises(ValueError, match="'kvzip' needs a model that reads its prompt again"):
        memory.begin(Call(90))


def test_settings_are_checked():
    with pytest.raises(TypeError, match="'ask': expected a list of token ids, got str"):
        parse_memory({"name": "kvzip", "ask": "again"})
    with pytest.raises(ValueError, match="'ask': expected at least 0, got -1"):
        parse_memory({"name": "kvzip", "ask": [5, -1]})
    with pytest.raises(ValueError, match="'part': expected at least 2, got 1"):
        parse_memory({"name": "kvzip", "part": 1})
    assert bt.BitNetConfig(cache={"name": "kvzip", "ask": [5]}, attention="full").cache is not None
