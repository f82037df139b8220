"""A cache with a prompt in a file: it goes on as if nothing had happened, or is refused whole."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitnet_triton as bt

LSH = {"mode": "lsh_sampling", "bits": 3, "tables": 8, "sinks": 1, "recent": 4}
VERIFIED = {"mode": "verified_sampling", "page": 4, "selected": 4, "local": 1, "base": 3}
MODES = {
    "full": "full",
    "lsh_sampling": LSH,
    "lsh after full": {"prefill": "full", "decode": ["full", LSH]},
    "verified_sampling": VERIFIED,
    "signs of keys": {**VERIFIED, "find": "signs"},
}

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def load(checkpoint):
    def load(attention, fuse=True):
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), fuse=False)
        bt.set_attention(model, attention)
        return bt.fuse(model) if fuse else model

    return load


def prefilled(model, ids, mask, steps=3):
    with torch.inference_mode():
        cache = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
    go_on(model, ids, mask, cache, 20, 20 + steps)
    return cache


def go_on(model, ids, mask, cache, start, end):
    found = []
    with torch.inference_mode():
        for t in range(start, end):
            place = (mask[:, : t + 1].cumsum(1) - 1).clamp_min(0)[:, t:]
            found.append(
                model(
                    ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=place,
                    past_key_values=cache, prompt_len=20,
                ).logits
            )  # fmt: skip
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", MODES)
def test_it_goes_on_as_if_nothing_had_happened(name, load, token_ids, tmp_path):
    model, ids = load(MODES[name]), token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = prefilled(model, ids, mask)
    bt.save_cache(model, cache, tmp_path / "cache.safetensors")
    expected = go_on(model, ids, mask, cache, 23, 40)
    again = bt.load_cache(load(MODES[name]), tmp_path / "cache.safetensors")
    assert again.get_seq_length() == 23
    found = go_on(load(MODES[name]), ids, mask, again, 23, 40)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture
def saved(load, token_ids, tmp_path):
    model, ids = load(LSH), token_ids(1, 40)
    path = tmp_path / "cache.safetensors"
    bt.save_cache(model, prefilled(model, ids, torch.ones_like(ids)), path)
    return model, path


def test_another_attention_is_refused(saved, load):
    for other in ("full", {**LSH, "seed": 1}, {**LSH, "tables": 9}):
        with pytest.raises(bt.CheckpointError, match="expected attention"):
            bt.load_cache(load(other), saved[1])


def test_another_model_is_refused(saved):
    model, path = saved
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    with pytest.raises(bt.CheckpointError, match="another model"):
        bt.load_cache(model, path)


def test_changed_contents_are_refused(saved):
    model, path = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for name in ("0.keys", "1.tables.ids", "0.tables.offsets"):
        tensors = load_file(path)
        flat = tensors[name].view(-1)
        if name.endswith("ids"):
            flat = flat.view(torch.int16)
        flat[5] += 1
        save_file(tensors, path.with_name("other"), metadata=metadata)
        with pytest.raises(bt.CheckpointError, match="not those that were written"):
            bt.load_cache(model, path.with_name("other"))
    metadata["about"] = metadata["about"].replace('"bits": 3', '"bits": 4')
    save_file(load_file(path), path.with_name("other"), metadata=metadata)
    with pytest.raises(bt.CheckpointError, match="not those that were written"):
        bt.load_cache(model, path.with_name("other"))


def test_what_is_no_such_file_is_refused(saved, tmp_path):
    model = saved[0]
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "others")
    for name, message in (
        ("text", "expected a safetensors file"), ("none", "expected a safetensors file"),
        ("others", "expected a file of `save_cache`"),
    ):  # fmt: skip
        with pytest.raises(bt.CheckpointError, match=message):
            bt.load_cache(model, tmp_path / name)


def test_layers_that_drop_tokens_are_not_saved(load, token_ids, tmp_path):
    model, ids = load({"mode": "sliding", "window": 4}), token_ids(1, 20)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match="`cache`: layer 0: expected tokens in a layer that keeps all"
    ):
        bt.save_cache(model, cache, tmp_path / "cache")


def test_scales_of_another_model_are_noticed(saved, load):
    other = load(LSH)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight_scale.mul_(2)
    with pytest.raises(bt.CheckpointError, match="another model"):
        bt.load_cache(other, saved[1])


def test_fusing_is_no_other_model(saved, load):
    assert bt.load_cache(load(LSH, fuse=False), saved[1]).get_seq_length() == 23


def test_adapters_that_were_there_have_to_be_there_again(load, token_ids, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    tuned, ids = peft.get_peft_model(load("full"), config).eval(), token_ids(1, 40)
    mask, path = torch.ones_like(ids), tmp_path / "cache.safetensors"

    def logits(cache):
        with torch.no_grad():
            return tuned(ids[:, 23:], past_key_values=cache, use_cache=True).logits

    cache = prefilled(tuned, ids, mask)
    bt.save_cache(tuned, cache, path)
    again = bt.load_cache(tuned, path)
    assert torch.equal(logits(again), logits(cache))
    with pytest.raises(bt.CheckpointError, match="another model"):
        bt.load_cache(load("full"), path)
    with tuned.disable_adapter():
        with pytest.raises(bt.CheckpointError, match="another model"):
            bt.load_cache(tuned, path)
        # without them it is the model of before
        bt.save_cache(tuned, prefilled(tuned, ids, mask), path)
    assert bt.load_cache(load("full"), path).get_seq_length() == 23
    with pytest.raises(bt.CheckpointError, match="another model"):
        bt.load_cache(tuned, path)
