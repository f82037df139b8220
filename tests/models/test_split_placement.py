"""Keys, values and tables on another device than the model: on a CPU, by what moves and where."""

import pytest
import torch

import bitnet_triton as bt

SETTINGS = {"mode": "lsh_sampling", "bits": 4, "tables": 16, "sinks": 2, "recent": 8}


def load(**more):
    attention = {"prefill": "full", "decode": SETTINGS | more}
    return bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention=attention)


def prompts(lengths):
    ids = torch.randint(2, 100, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def generate(model, inputs, **settings):
    return model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_are_those_of_one_device(beams):
    inputs = prompts([40, 31])
    # without recorded steps both do the same, in the same order
    with bt.use_backend("reference"):
        found = [
            generate(load(**more), inputs, num_beams=beams)
            for more in ({}, {"memory_device": "cpu"})
        ]
    assert torch.equal(found[0].sequences, found[1].sequences)


@pytest.mark.parametrize("lengths", [[40], [40, 31]], ids=str)
def test_only_new_tokens_and_queries_go_over(lengths):
    cache = generate(load(memory_device="cpu"), prompts(lengths)).past_key_values
    for layer in cache.layers:
        # keys and values of the prompt, and its padding; then keys, values and the query of a token
        padding = len(set(lengths)) > 1
        assert (layer.transfers.sent, layer.transfers.fetched) == (2 + padding + 5 * 3, 5)
        assert layer.hashed.length == layer.keys.shape[2] == 45
        assert {t.device.type for t in (*layer.tensors(), *layer.hashed.tensors)} == {"cpu"}


def test_a_prompt_goes_on_and_a_saved_one_comes_back(tmp_path):
    ids, file = prompts([60])["input_ids"], tmp_path / "prompt.safetensors"

    def go_on(model, cache):
        return model(ids[:, 50:], past_key_values=cache, use_cache=True, prompt_len=60).logits

    with bt.use_backend("reference"), torch.no_grad():
        plain, split = load(), load(memory_device="cpu")
        caches = [
            model(ids[:, :50], use_cache=True, prompt_len=50).past_key_values
            for model in (plain, split)
        ]
        bt.save_cache(split, caches[1], file)
        expected = go_on(plain, caches[0])
        assert torch.equal(go_on(split, caches[1]), expected)
        assert torch.equal(go_on(split, bt.load_cache(split, file)), expected)


@pytest.mark.parametrize("place", ["cuda", "cuda:1", "meta", "disk", 0])
def test_other_devices_are_refused(place):
    with pytest.raises(ValueError, match=f"'memory_device': expected 'cpu', .* got {place!r}"):
        load(memory_device=place)


def test_modes_that_cannot_say_so():
    with pytest.raises(ValueError, match="memory_device"):
        bt.BitNetForCausalLM.from_pretrained(
            bt.TINY_MODEL, attention={"mode": "verified_sampling", "memory_device": "cpu"}
        )
