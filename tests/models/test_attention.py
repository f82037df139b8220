"""config.attention in a model: the plan is followed, padding is seen, generation agrees."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import MODES, register_mode
from bitnet_triton.attention.modes.full import Full


@dataclass(frozen=True)
class Spy(Full):
    """Full attention that writes down where it was called."""

    label: str
    calls: ClassVar[list] = []

    def __call__(self, q, k, v, context):
        phase = context.phase(q.shape[1])
        self.calls.append((self.label, context.layer, phase, tuple(q.shape), k.shape[1]))
        return super().__call__(q, k, v, context)


@pytest.fixture
def spies(monkeypatch):
    monkeypatch.setitem(MODES, "spy", Spy)  # goes with the test
    register_mode("spy", Spy)
    monkeypatch.setattr(Spy, "calls", [])
    return lambda label: {"mode": "spy", "label": label}


def test_each_layer_and_phase_runs_its_own_mode(spies, checkpoint, token_ids):
    attention = {"prefill": [spies("a"), spies("b")], "decode": spies("c")}
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention)
    with torch.no_grad():
        cache = model(token_ids(2, 5)).past_key_values
        model(token_ids(2, 1), past_key_values=cache, prompt_len=5)
    assert Spy.calls == [
        ("a", 0, "prefill", (2, 5, 4, 16), 5),
        ("b", 1, "prefill", (2, 5, 4, 16), 5),
        ("c", 0, "decode", (2, 1, 4, 16), 6),
        ("c", 1, "decode", (2, 1, 4, 16), 6),
    ]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_is_that_of_transformers_attention(cache, checkpoint):
    ids = torch.tensor([[0, 0, 0, 1, 9, 30], [1, 5, 23, 71, 8, 40]])
    plain, full = (
        bt.BitNetForCausalLM.from_pretrained(checkpoint(), **settings).generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            cache_implementation=cache,
        )
        for settings in ({}, {"attention": "full"})
    )
    assert torch.equal(plain, full)


def test_padding_does_not_change_other_rows(checkpoint, logits):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention="full")
    padded = torch.tensor([[0, 0, 0, 1, 9, 30]])
    # two thirds of the row are padding: unmasked, its keys would change every logit
    alone = logits(model, padded[:, 3:])
    masked = logits(model, padded, attention_mask=(padded != 0).long())[:, 3:]
    unmasked = logits(model, padded)[:, 3:]  # distances are all that rotary embeddings tell
    assert (masked - alone).norm() < 0.1 * (unmasked - alone).norm()


@pytest.mark.parametrize(
    "attention",
    [
        {"mode": "sliding", "window": 3, "sinks": 1},
        {"mode": "streaming", "window": 3, "sinks": 1},
        {"preset": "swaa-untrained", "window": 3, "sinks": 1},
    ],
    ids=["sliding", "streaming", "swaa"],
)
def test_fused_layers_follow_the_plan(attention, checkpoint, steady_ids, error):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention, fuse=False)
    ids = steady_ids(model, T=9, prompt_len=6)

    def steps():
        with torch.no_grad():
            out = model(ids[:, :7], prompt_len=6, use_cache=True)
            last = model(ids[:, 7:], prompt_len=6, past_key_values=out.past_key_values)
        return torch.cat([out.logits, last.logits], dim=1)

    plain = steps()
    bt.fuse(model)
    assert error(steps(), plain) <= 1e-5
    bt.unfuse(model)
    assert torch.equal(steps(), plain)


def test_the_name_works_without_a_plan(checkpoint, logits, steady_ids, error):
    named = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attn_implementation="bitnet_triton")
    assert named.config.attention is None
    plain = bt.BitNetForCausalLM.from_pretrained(checkpoint())
    ids = steady_ids(named, plain)
    assert error(logits(named, ids), logits(plain, ids)) <= 1e-5


def test_a_plan_and_another_attention_exclude_each_other(checkpoint):
    with pytest.raises(ValueError, match=r"expected none beside `config.attention`, got 'eager'"):
        bt.BitNetForCausalLM.from_pretrained(
            checkpoint(), attention="full", attn_implementation="eager"
        )


def test_a_model_with_a_plan_has_no_graph_break(checkpoint, error, default_backend):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention="full")
    ids = torch.tensor([[1, 5, 23, 71, 8, 40]])
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        expected = model(ids, use_cache=False).logits
    assert error(result, expected) <= 1e-2  # inductor may move an activation across a tie
    torch.compiler.reset()
