"""Memories by name: in configs, for one ``generate``, on the command line, and from outside."""

import dataclasses

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.cache import MEMORIES, GrowingLayer, Latest, SinkWindowLayer, parse_memory
from bitnet_triton.models.bitnet.planned import build_cache
from bitnet_triton.training.settings import parse_setting

FULL_AND_SLIDING = [{"mode": "sliding", "window": 16}, "full", "full"]


@pytest.fixture(scope="module")
def model():
    return bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full").eval()


def kinds(model):
    cache = build_cache(model.attention_plan, model.config.num_hidden_layers)
    return [type(layer) for layer in cache.layers]


def test_a_config_names_a_memory_and_is_saved_with_it(tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, cache={"name": "latest", "budget": 0.5}
    )
    assert model.config.cache == {"name": "latest", "budget": 0.5, "sinks": 4}
    assert model.attention_plan.cache == Latest(0.5)
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert again.config.cache == model.config.cache
    assert again.config.model_type == "bitnet_triton"
    assert kinds(again) == [type(Latest().memory())] * 3


def test_a_config_without_one_is_as_it_was():
    config = bt.BitNetConfig()
    assert config.to_dict()["model_type"] == "bitnet"
    assert "cache" not in config.to_dict()


def test_set_cache_changes_a_model_and_back():
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL)
    assert bt.set_cache(model, "latest") is model
    assert model.config.cache["name"] == "latest"
    assert model.config.attention == {"mode": "full"}
    bt.set_attention(model, {"prefill": FULL_AND_SLIDING, "decode": FULL_AND_SLIDING})
    # a layer that keeps a window goes on with it
    assert kinds(model) == [SinkWindowLayer, *[type(Latest().memory())] * 2]
    bt.set_cache(model, None)
    assert model.config.cache is None
    assert kinds(model) == [SinkWindowLayer, GrowingLayer, GrowingLayer]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("quest", "'latest' does not go with attention 'quest', which keeps a memory of its own"),
        ({"mode": "top_k", "keys": 8}, "attention 'top_k', which goes by the places of keys"),
        ({"mode": "strided", "block": 8}, "attention 'strided', which goes by the places"),
        (
            {"mode": "sliding", "window": 8},
            "no layer is left for 'latest'",
        ),
    ],
)
def test_attention_that_it_does_not_go_with_is_named(attention, message):
    with pytest.raises(ValueError, match=message):
        bt.BitNetConfig(attention=attention, cache="latest")
    model = bt.BitNetForCausalLM(bt.BitNetConfig(attention=attention, **_SMALL))
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        bt.set_cache(model, "latest")
    assert model.config.to_dict() == before


_SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "vocab_size": 8,
}  # fmt: skip


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="got 'lates'; did you mean 'latest'"):
        parse_memory("lates")
    with pytest.raises(ValueError, match="setting of 'latest' out of: budget, sinks; got 'budge'"):
        parse_memory({"name": "latest", "budge": 3})
    with pytest.raises(ValueError, match="'budget': expected at least 1, got 0"):
        parse_memory({"name": "latest", "budget": 0})
    with pytest.raises(ValueError, match=r"a share above 0 and up to 1, got 1\.5"):
        parse_memory({"name": "latest", "budget": 1.5})
    with pytest.raises(TypeError, match="'budget': expected an integer, got str"):
        parse_memory({"name": "latest", "budget": "all"})
    with pytest.raises(TypeError, match="expected a name or a dict, got int"):
        parse_memory(3)


def test_generate_takes_one_for_a_call(model):
    ids = torch.randint(10, 1000, (1, 30))
    output = model.generate(
        ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, eos_token_id=None,
        cache_implementation={"name": "latest", "budget": 10},
    )  # fmt: skip
    assert {layer.held for layer in output.past_key_values.layers} == {10}
    assert model.config.cache is None
    with pytest.raises(ValueError, match="expected none beside `past_key_values`"):
        model.generate(ids, past_key_values=output.past_key_values, cache_implementation="latest")
    static = model.generate(ids, max_new_tokens=3, cache_implementation="static")
    assert static.shape == (1, 33)


def test_generate_says_what_a_model_lacks():
    plain = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    with pytest.raises(ValueError, match=r"'latest' goes with `config.attention`.*set_attention"):
        plain.generate(torch.ones(1, 4, dtype=torch.long), cache_implementation="latest")


def test_the_command_line_names_one_with_its_settings():
    setting = parse_setting("full", "latest:budget=0.25,sinks=2")
    assert setting.name == "full latest:budget=0.25,sinks=2"
    assert setting.has_memory
    assert not parse_setting("full", "dynamic").has_memory
    with pytest.raises(ValueError, match=r"expected one of own, dynamic, static, .*latest.*, got"):
        parse_setting("full", "latets:budget=3")
    with pytest.raises(ValueError, match="setting of 'latest'"):
        parse_setting("full", "latest:share=3")


@dataclasses.dataclass(frozen=True)
class Everything(bt.MemoryKind):
    def memory(self):
        return GrowingLayer()


def test_a_memory_from_outside_is_one_among_them(model):
    bt.register_memory("everything", Everything)
    try:
        bt.register_memory("everything", Everything)  # again changes nothing
        ids = torch.randint(10, 1000, (1, 20))
        own = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(
            own,
            model.generate(
                ids, max_new_tokens=4, do_sample=False, cache_implementation="everything"
            ),
        )
        with pytest.raises(ValueError, match=r"'everything' is .*Everything"):
            bt.register_memory("everything", type("Other", (Latest,), {}))
        with pytest.raises(ValueError, match="Everything is 'everything' already"):
            bt.register_memory("all", Everything)
    finally:
        del MEMORIES["everything"]
    with pytest.raises(TypeError, match="expected a frozen dataclass that derives from MemoryKind"):
        bt.register_memory("some", GrowingLayer)
    with pytest.raises(ValueError, match="'static' is a cache of transformers"):
        bt.register_memory("static", type("Static", (Latest,), {}))
    with pytest.raises(ValueError, match="expected a Python name, got 'a b'"):
        bt.register_memory("a b", type("Ab", (Latest,), {}))


def test_reversible_layers_go_without():
    with pytest.raises(ValueError, match="`cache`: expected none beside `reversible`"):
        bt.BitNetConfig(cache="latest", reversible=True)
