"""The embedded text model reads 4096 tokens, here and in transformers alone."""

import inspect
import json
import math
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoTokenizer

import bitnet_triton as bt

TRAINED, LONG = 1024, 4096


@pytest.fixture(scope="module")
def model():
    return bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    assert tokenizer.model_max_length == LONG
    # modules that are not held out: what is compared is the same text, read near and far
    text = inspect.getsource(statistics) + inspect.getsource(textwrap) + inspect.getsource(json)
    return tokenizer(text, return_tensors="pt").input_ids[:, :LONG]


@torch.inference_mode()
def losses(model, ids, **kwargs):
    logits = model(ids, use_cache=False, **kwargs).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_what_stands_far_back_helps(model, ids):
    whole = losses(model, ids)
    windows = [losses(model, part) for part in ids.split(TRAINED, dim=1)]
    # beyond the first window each token of the long one has seen more than in its short one
    assert whole[TRAINED:].mean() < 0.99 * torch.cat(windows[1:]).mean()


def test_generation_across_the_trained_length_is_what_the_model_reads_uncached(model, ids):
    prompt, new = ids[:, : TRAINED - 10], 24
    out = model.generate(
        prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, repetition_penalty=1.0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    cached, length = torch.stack(out.logits, 1)[0], prompt.shape[1] + new
    with torch.inference_mode():
        whole = model(out.sequences, use_cache=False).logits[0, -new - 1 : -1]
        short = model(out.sequences[:, :TRAINED], use_cache=False).logits[0, -11:]
    # eight bits of an activation may round otherwise: far less than keys that are turned otherwise
    error = (cached - whole).square().mean().sqrt()
    otherwise = (cached[:11] - short).square().mean().sqrt()
    assert error < 0.1 * otherwise
    assert out.past_key_values._frequencies.lengths == (length,)


def test_a_loop_that_leaves_the_choice_of_its_cache_is_refused(model, ids):
    with torch.inference_mode():
        cache = model(ids[:, : TRAINED - 1], use_cache=True).past_key_values
        cache = model(ids[:, :1], past_key_values=cache).past_key_values
        with pytest.raises(ValueError, match=r"give its first call .* `context_length`"):
            model(ids[:, :1], past_key_values=cache)
        cache = model(ids[:, : TRAINED - 1], use_cache=True, context_length=LONG).past_key_values
        for _ in range(3):
            cache = model(ids[:, :1], past_key_values=cache).past_key_values


def test_transformers_alone_reads_it(model, ids):
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(bt.TINY_MODEL)!r})
assert "bitnet_triton" not in sys.modules
for T in (200, 1500):
    ids = torch.tensor({ids[0, :1500].tolist()})[None, :T]
    with torch.inference_mode():
        print(model(ids, labels=ids).loss.item())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for T, theirs in zip((200, 1500), map(float, done.stdout.split())):
        ours = losses(model, ids[:, :T]).mean().item()
        assert math.isclose(ours, theirs, rel_tol=0.01)  # theirs is in bfloat16
