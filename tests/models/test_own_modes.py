"""Modes of users: which names and settings they may have, and what they bring to a layer."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import bitnet_triton as bt
from bitnet_triton.attention import MODES
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.cache import GrowingLayer, SinkWindowLayer
from bitnet_triton.models.fused.layer import FusedDecoderLayer


@dataclass(frozen=True)
class Inner:
    number: int = 1


@dataclass(frozen=True)
class Own(Full):
    """Full attention with settings and parameters that do nothing."""

    size: int = 2
    pairs: Any = ()
    made: Any = field(default_factory=lambda: (3,))

    def module(self, config):
        return nn.Linear(self.size, self.size)


@pytest.fixture
def own(monkeypatch):
    """Register a fresh class under a name, until the test ends."""

    def register(name, base=Own):
        kind = dataclass(frozen=True)(type("Kind", (base,), {"__module__": __name__}))
        monkeypatch.setitem(MODES, name, kind)
        del MODES[name]
        bt.register_mode(name, kind)
        return kind

    return register


@pytest.mark.parametrize("name", ["q_proj", "layer_idx", "scaling", "attention_plan", "train"])
def test_a_name_that_an_attention_layer_needs_is_refused(name, own, checkpoint):
    own(name)
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    with pytest.raises(ValueError, match=f"no mode can be called '{name}'"):
        bt.set_attention(model, name)
    assert model.config.attention is None
    with pytest.raises(ValueError, match=f"no mode can be called '{name}'"):
        bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), attention=name)


def test_names_of_others_are_refused(own):
    with pytest.raises(ValueError, match="'swaa' is a preset"):
        own("swaa")
    kind = own("own")
    bt.register_mode("own", kind)  # again, as a notebook does
    with pytest.raises(ValueError, match="Kind is 'own' already; derive a class from it"):
        bt.register_mode("other", kind)
    with pytest.raises(ValueError, match="Full is 'full' already"):
        bt.register_mode("other", Full)
    assert Full.name == "full"


def test_settings_come_back_from_a_config(own, checkpoint, tmp_path):
    own("own")
    setting = {"mode": "own", "size": 2, "pairs": [[1, 2], [3]], "made": [3]}
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), attention=None)
    bt.set_attention(model, {"mode": "own", "pairs": [[1, 2], [3]]})
    assert model.attention_plan.prefill[0].pairs == ((1, 2), (3,))
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention == setting
    assert again.attention_plan == model.attention_plan


@pytest.mark.parametrize("value", [{"a": 1}, Inner()], ids=str)
def test_a_setting_that_is_no_number_word_or_list_is_refused(value, own, checkpoint):
    own("own")
    with pytest.raises(TypeError, match="mode 'own': expected settings of numbers, words"):
        bt.BitNetForCausalLM.from_pretrained(
            checkpoint("packed"), attention={"mode": "own", "pairs": value}
        )


def test_another_size_of_parameters_replaces_the_former_ones(own, checkpoint):
    own("own")
    model = bt.set_attention(
        bt.BitNetForCausalLM.from_pretrained(checkpoint("packed")), {"mode": "own", "size": 2}
    )
    kept = model.model.layers[0].self_attn.own
    bt.set_attention(model, {"mode": "own", "pairs": [1]})
    assert model.model.layers[0].self_attn.own is kept
    bt.set_attention(model, {"mode": "own", "size": 3})
    assert model.model.layers[0].self_attn.own.weight.shape == (3, 3)


@pytest.mark.usefixtures("default_backend")
def test_a_plan_that_is_refused_leaves_the_model_as_it_was(own, checkpoint):
    own("own")
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), attention="full")
    plan = model.attention_plan
    with pytest.raises(ValueError, match="two modes 'own' of one layer bring parameters"):
        bt.set_attention(
            model, {"prefill": {"mode": "own", "size": 1}, "decode": {"mode": "own", "size": 2}}
        )
    assert model.config.attention == {"mode": "full"}
    assert model.attention_plan is plan
    assert all(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)


class Unsaved(Full):
    def module(self, config):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.ones(2), persistent=False)
        return module


def test_buffers_that_no_checkpoint_has_are_refused(own, checkpoint):
    """transformers builds models without memory: nobody would fill them."""
    own("own", Unsaved)
    with pytest.raises(ValueError, match="mode 'own': loading would leave the buffer 'table' emp"):
        bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), attention="own")


@pytest.mark.parametrize("attention", [None, "full", {"mode": "sliding", "window": 3}])
def test_a_memory_is_told_that_attention_has_run(attention, monkeypatch, checkpoint):
    told = []
    for kind in (GrowingLayer, SinkWindowLayer):
        monkeypatch.setattr(kind, "after", lambda self, attended: told.append(attended))
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 23, 71]]), use_cache=True)
    assert len(told) == (0 if attention is None else 2)  # transformers' attention tells nobody
    for attended in told:
        q, k, lse = attended.q, attended.k, attended.lse
        scores = (q[0, -1, 0] @ k[0, :, 0].T) * q.shape[-1] ** -0.5
        seen = scores[-3:] if isinstance(attention, dict) else scores
        torch.testing.assert_close(lse[0, 0, -1], seen.logsumexp(0))
