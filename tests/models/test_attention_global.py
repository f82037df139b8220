"""Projections of their own for global tokens: added as copies, trained, saved, loaded."""

import pytest
import torch

import bitnet_triton as bt

ATTENTION = {"mode": "longformer", "window": 2, "global_tokens": [0, 3]}
OWN = {**ATTENTION, "global_projections": True}
PLAN = {"prefill": ["full", ATTENTION], "decode": ["full", ATTENTION]}


def names(model):
    return [name for name, _ in model.named_modules() if "longformer." in name]


@pytest.mark.parametrize("format", ["packed", "online"])
def test_a_model_computes_the_same_until_they_are_trained(
    format, checkpoint, steady_ids, logits, error, tmp_path
):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(format), attention=ATTENTION)
    ids = steady_ids(model)
    before = logits(model, ids)
    assert bt.add_global_projections(model) is model
    assert len(names(model)) == 6
    assert error(logits(model, ids), before) <= 1e-5
    bt.add_global_projections(model)
    assert len(names(model)) == 6

    with torch.no_grad():
        for name in names(model):
            weight = model.get_submodule(name).weight
            weight.copy_(weight.flip(0))
    after = logits(model, ids)
    assert error(after, before) > 1e-2
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention["global_projections"] is True
    assert torch.equal(logits(again, ids), after)


def test_only_layers_that_have_global_tokens_get_them(checkpoint, logits, token_ids):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=PLAN)
    bt.add_global_projections(model)
    assert {name.split(".")[2] for name in names(model)} == {"1"}


def test_a_checkpoint_without_them_is_refused_as_incomplete(checkpoint):
    with pytest.raises(bt.CheckpointError, match="longformer"):
        bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=OWN)


def test_a_fresh_model_begins_with_copies_and_trains_them(token_ids):
    config = bt.BitNetConfig(
        vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention=OWN,
    )  # fmt: skip
    model = bt.BitNetForCausalLM(config)
    for layer in model.model.layers:
        for name in "qkv":
            one = getattr(layer.self_attn, f"{name}_proj")
            two = getattr(layer.self_attn.longformer, f"{name}_proj")
            assert torch.equal(one.weight, two.weight)
            assert one.weight is not two.weight
    ids = token_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for name in names(model):
        assert model.get_submodule(name).weight.grad.abs().sum() > 0


def test_generation_with_a_cache_is_one_forward(checkpoint, token_ids, logits):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("dense"), attention=ATTENTION)
    bt.add_global_projections(model)
    ids = token_ids(2, 6)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    output = model.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, use_cache=False, **kwargs), output)
    with pytest.raises(ValueError, match="belong into the first call of a text"):
        model.generate(ids[:, :2], **kwargs)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (None, "expected attention 'longformer' in `config.attention`"),
        ({"mode": "sliding", "window": 2}, "expected attention 'longformer'"),
        ({"mode": "longformer", "window": 2}, "expected a layer with 'global_tokens'"),
    ],
)
def test_a_model_without_global_tokens_is_refused(attention, message, checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention)
    with pytest.raises(ValueError, match=message):
        bt.add_global_projections(model)
