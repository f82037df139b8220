"""A prefix that is read once and then continued, in another gradient mode too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.models import BitNetForCausalLM

pytestmark = pytest.mark.usefixtures("default_backend")

PLANS = [
    None,
    {"mode": "sliding", "window": 6, "sinks": 1},
    {"mode": "streaming", "window": 6, "sinks": 2},
]
TEXTS = ["import os\nimport sys\n\ndef main(path):\n", "import os\nimport json\n\nclass A:\n"]


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def read(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_prefix_read_in_inference_mode_is_continued_outside(prompts, plan, beams):
    model = BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention=plan).eval()
    settings = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(prompts)}

    def go_on(cache):
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        return model.generate(prompts, past_key_values=cache, **settings)

    outside = read(model, prompts[:, :8])
    with torch.inference_mode():
        inside = model(prompts[:, :8], use_cache=True).past_key_values

    assert torch.equal(go_on(inside), go_on(outside))
