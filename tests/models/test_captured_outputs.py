"""Hidden states that are asked for come out, whatever was built before in the process."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers.utils import output_capturing

import bitnet_triton as bt
from bitnet_triton.attention.hub import function
from bitnet_triton.models import BitNetForCausalLM
from bitnet_triton.models.fuse import introduce

pytestmark = pytest.mark.usefixtures("default_backend")

PLANS = [None, "full", {"mode": "sliding", "window": 4, "sinks": 1}]


@pytest.fixture
def _new_process():
    """Forget of which classes transformers has seen a model: it notes them when it builds one."""
    registry = output_capturing._CAN_RECORD_REGISTRY
    known = dict(registry)
    registry.clear()
    introduce.cache_clear()
    yield
    registry.update(known)


@pytest.mark.usefixtures("_new_process")
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_hidden_states_come_out_of_the_first_model(checkpoint, steady_ids, error, plan, is_fused):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan, fuse=is_fused).eval()
    ids = steady_ids(model, B=2, T=9)
    seen = []
    handles = [
        layer.register_forward_hook(lambda *a: seen.append(a[-1])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
        for handle in handles:
            handle.remove()
        states = [
            part(ids, output_hidden_states=True).hidden_states for part in (model, model.model)
        ]
    written = model.generate(
        ids, max_new_tokens=3, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_hidden_states=True,
    ).hidden_states  # fmt: skip

    expected = [model.model.embed_tokens(ids), seen[0], model.model.norm(seen[1])]
    for found in (*states, written[0]):
        assert [error(a, b) < 2e-5 for a, b in zip(found, expected, strict=True)] == [True] * 3
    assert [[tuple(s.shape) for s in step] for step in written[1:]] == [[(2, 1, 64)] * 3] * 2


@pytest.mark.usefixtures("_new_process")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_hidden_states_come_out_after_each_swap_of_a_class(checkpoint, token_ids, plan):
    model, ids = (
        BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan).eval(),
        token_ids(2),
    )

    for change in (bt.unfuse, bt.fuse, bt.unfuse):
        with torch.no_grad():
            assert len(change(model)(ids, output_hidden_states=True).hidden_states) == 3


def test_attentions_that_nobody_keeps_are_told_once(checkpoint, token_ids, caplog):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention="full").eval()
    function._tell_no_weights.cache_clear()

    with caplog.at_level(logging.WARNING, logger="bitnet_triton"), torch.no_grad():
        for _ in range(2):
            assert not model(token_ids(2), output_attentions=True).attentions

    assert [r.message for r in caplog.records if "output_attentions" in r.message] == [
        "`output_attentions`: attention 'bitnet_triton' keeps no weights, nothing is returned for "
        'them; attn_implementation="eager" does'
    ]


def test_attentions_of_eager_are_rows_of_weights(checkpoint, token_ids):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attn_implementation="eager").eval()

    with torch.no_grad():
        weights = model(token_ids(2), output_attentions=True).attentions

    assert [tuple(w.shape) for w in weights] == [(2, 4, 8, 8)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 8))
