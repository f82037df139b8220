"""Texts in one row, told by positions that start again, come out as if each were alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

import bitnet_triton as bt
from bitnet_triton import use_ternary_kernels
from bitnet_triton.models import BitNetForCausalLM

pytestmark = pytest.mark.usefixtures("default_backend")

LENGTHS = (5, 1, 7, 3)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
PLANS = [
    None,
    "full",
    {"mode": "sliding", "window": 4, "sinks": 1},
    {"mode": "longformer", "window": 4},
]


def masks(ids):
    """Return masks that hide no token: none, ones, ones in another dtype."""
    return [None, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)]


@torch.no_grad()
def check_alone(model, ids, error, limit=2e-5):
    """Check that each text has the logits that it has alone, with every mask."""
    alone = torch.cat([model(text, use_cache=False).logits for text in ids.split(LENGTHS, 1)], 1)
    for mask in masks(ids):
        for positions in (POSITIONS, POSITIONS.expand(len(ids), -1)):
            packed = model(ids, attention_mask=mask, position_ids=positions)
            assert error(packed.logits, alone) < limit


def steady_texts(model, steady_ids):
    """Return texts [2 16] that stay away from ties when each stands alone."""
    longest = steady_ids(model, B=2, T=max(LENGTHS))
    return torch.cat([longest[:, :n].flip(0) if n % 3 else longest[:, :n] for n in LENGTHS], 1)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_mask_of_ones_does_not_join_texts(checkpoint, steady_ids, error, plan, is_fused):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan, fuse=is_fused).eval()
    ids = steady_texts(model, steady_ids)
    check_alone(model, ids, error)
    if plan is not None or is_fused:  # its decoder is of this package then
        with torch.no_grad():
            alone = [model.model(text)[0] for text in ids.split(LENGTHS, 1)]
            packed = model.model(ids, attention_mask=masks(ids)[1], position_ids=POSITIONS)[0]
        assert error(packed, torch.cat(alone, 1)) < 2e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "bitnet_triton"])
def test_a_fused_llama_does_not_join_texts(checkpoint, steady_ids, error, implementation):
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint("bitlinear", arch="llama"), attn_implementation=implementation
    )
    model = use_ternary_kernels(theirs).eval()
    check_alone(model, steady_texts(model, steady_ids), error)


@pytest.mark.parametrize("window", [None, 3])
def test_a_model_of_transformers_with_our_masks_does_not_join_texts(token_ids, error, window):
    config = MistralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    model = MistralForCausalLM._from_config(config, attn_implementation="bitnet_triton").eval()
    check_alone(model, token_ids(2, sum(LENGTHS)), error)


def test_padding_behind_texts_changes_nothing(checkpoint, steady_ids, error):
    model = BitNetForCausalLM.from_pretrained(checkpoint()).eval()
    ids = steady_texts(model, steady_ids)
    behind = (0, 4)
    padded, mask = (torch.nn.functional.pad(t, behind) for t in (ids, torch.ones_like(ids)))
    positions = torch.nn.functional.pad(POSITIONS, behind)
    with torch.no_grad():
        alone = model(ids, position_ids=POSITIONS).logits
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert error(logits[:, : ids.shape[1]], alone) < 2e-5


@pytest.mark.parametrize("plan", [None, "full"], ids=str)
def test_packed_texts_beside_a_cache_or_behind_padding_are_refused(checkpoint, token_ids, plan):
    model = BitNetForCausalLM.from_pretrained(checkpoint(), attention=plan).eval()
    ids = token_ids(1, sum(LENGTHS))
    mask = torch.ones_like(ids)
    for more in ({"past_key_values": DynamicCache()}, {"use_cache": True}):
        with pytest.raises(ValueError, match="packed sequences go without a cache"):
            model(ids, attention_mask=mask, position_ids=POSITIONS, **more)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match="packed sequences have padding behind them only"):
        model(ids, attention_mask=mask, position_ids=POSITIONS)


def test_positions_that_are_no_texts_in_a_row_are_left_alone(checkpoint, token_ids):
    model = BitNetForCausalLM.from_pretrained(checkpoint()).eval()
    ids = token_ids(1, 8)
    mask = torch.ones_like(ids)
    for positions in ([0, 0, 1, 1, 2, 2, 3, 3], range(8), range(5, 13)):
        out = model(ids, attention_mask=mask, position_ids=torch.tensor([list(positions)]))
        assert out.past_key_values.get_seq_length() == 8
    written = bt.unfuse(model).generate(ids, max_new_tokens=2, do_sample=False)
    assert written.shape[1] >= 9
