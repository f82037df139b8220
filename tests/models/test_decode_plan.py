"""Recorded decode steps of models with an attention plan: those of the modes one by one."""

import logging

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.cache import streaming
from bitnet_triton.kernels.lsh_sampling import tables
from bitnet_triton.models.fused.recording import Recording

SLIDING = {"mode": "sliding", "window": 5, "sinks": 2}
LOCAL = {"mode": "local", "block": 8}
POOLED = {"mode": "pooled_blocks", "block": 4, "selected": 3}
INDEXED = {"mode": "indexed_blocks", "block": 4, "selected": 3, "index_keys": "float"}
QUEST = {"mode": "quest", "page": 4, "budget": 12}
LSH = {"mode": "lsh_sampling", "bits": 2, "tables": 6, "sinks": 1, "recent": 4}
VERIFIED = {
    "mode": "verified_sampling", "page": 4, "selected": 4, "local": 1, "base": 3, "epsilon": 0.5,
    "delta": 0.5,
}  # fmt: skip
SPARSE = {
    "mode": "native_sparse", "block": 4, "stride": 2, "selection": 4, "selected": 3, "window": 5,
}  # fmt: skip
RECORDED = {
    "full": "full",
    "sliding": SLIDING,
    "no sinks": {"mode": "sliding", "window": 4},
    "mixed": {"prefill": [SLIDING, "full"], "decode": [SLIDING, "full"]},
    "full decode": {"prefill": SLIDING, "decode": "full"},
    "full prefill": {"prefill": "full", "decode": SLIDING},
    "swaa": {"preset": "swaa-untrained", "window": 6, "sinks": 2},
    "wide": {"mode": "sliding", "window": 40, "sinks": 1},
    "streaming": {"mode": "streaming", "window": 4, "sinks": 1},
    "streaming phases": {
        "prefill": {"mode": "streaming", "window": 9, "sinks": 2},
        "decode": {"mode": "streaming", "window": 5, "sinks": 3},
    },
    "local": {"mode": "local", "block": 4},
    "strided": {"mode": "strided", "block": 5},
    "fixed": {"mode": "fixed", "block": 6, "summary": 2},
    "longformer": {"mode": "longformer", "window": 4, "dilation": 2},
    "global": {"mode": "longformer", "window": 4, "global_tokens": [0, 3, 20, 35]},
    "two patterns": {
        "prefill": [LOCAL, {"mode": "strided", "block": 4}],
        "decode": [LOCAL, {"mode": "strided", "block": 4}],
    },
    "pooled_blocks": POOLED,
    "pooled windows": {**POOLED, "window": 4, "stride": 2, "dense_below": 16},
    "indexed_blocks": INDEXED,
    "indexed codes": {**INDEXED, "index_keys": "int8", "dense_below": 12},
    "quest": QUEST,
    "native_sparse": SPARSE,
    "sparse means": {**SPARSE, "compression": "mean", "block": 6, "selection": 8, "local": 1},
    "sparse decode": {"prefill": "full", "decode": SPARSE},
    "blocks mixed": {"prefill": "full", "decode": [INDEXED, {**QUEST, "dense_below": 20}]},
    "lsh_sampling": LSH,
    "lsh union": {**LSH, "share": "union"},
    "lsh proposal": {**LSH, "share": "proposal"},
    "lsh after full": {"prefill": "full", "decode": ["full", LSH]},
    "verified_sampling": VERIFIED,
}
LAUNCHED = {
    "sparse maps": {**SPARSE, "compression": "linear"},
    "sparse branches": {**SPARSE, "shared_kv": False},
    "quest by head": {**QUEST, "per_head": True},
    "top_k": {"mode": "top_k", "keys": 3},
    "signs": {**VERIFIED, "find": "signs"},
    "head windows": {"mode": "longformer", "window": [4, 4, 6, 6]},
    "head dilations": {"mode": "longformer", "window": 4, "dilation": [1, 1, 2, 2]},
    "global mask": {"mode": "longformer", "window": 4, "global_mask": True},
}
PATTERNS = ["streaming", "streaming phases", "local", "strided", "fixed", "longformer", "global"]
SAMPLED = ["lsh_sampling", "lsh union", "lsh proposal", "lsh after full", "verified_sampling"]
BLOCKS = ["pooled_blocks", "pooled windows", "indexed_blocks", "quest", "blocks mixed"]
BLOCKS += ["native_sparse", "sparse decode"]
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30, 7], [1, 5, 23, 71, 8, 40, 6]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def replays(monkeypatch):
    """Collect the recordings that were replayed."""
    seen = []
    replay = Recording.replay

    def count(recording, *args):
        seen.append(recording)
        return replay(recording, *args)

    monkeypatch.setattr(Recording, "replay", count)
    return seen


@pytest.fixture
def load(checkpoint):
    def load(attention):
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), fuse=False)
        return bt.set_attention(model, attention)  # some modes bring parameters

    return load


def steps(model, ids, start, n, mask=None, **kwargs):
    """Return the logits of ``n`` steps after ``start`` tokens."""
    # bounds of pages depend on the angles of keys: as in generate, they go by the text
    by_text = mask is not None and any(
        mode.name in ("quest", "lsh_sampling", "verified_sampling") for mode in model.attention_plan
    )

    def seen(first, end):
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        if by_text:
            given["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, first:]
        return given

    with torch.inference_mode():
        cache = model(ids[:, :start], use_cache=True, **seen(0, start), **kwargs).past_key_values
        found = [
            model(ids[:, t : t + 1], past_key_values=cache, **seen(t, t + 1), **kwargs).logits
            for t in range(start, start + n)
        ]
    return torch.cat(found, 1)


def close(a, b):
    # a code beside a tie may fall to its other side; a wrong key moves logits by whole units
    return (a - b).norm() <= 3e-2 * b.norm()


@pytest.mark.parametrize("name", RECORDED)
def test_logits_are_those_of_the_modes(name, load, token_ids, replays):
    model, ids = load(RECORDED[name]), token_ids(2, 40)
    expected = steps(model, ids, 7, 33, prompt_len=7)
    assert close(steps(bt.fuse(model), ids, 7, 33, prompt_len=7), expected)
    assert len(replays) >= 28
    # where layers drop tokens the groups change, and memory reaches its full size
    assert len(set(replays)) <= 4


def test_a_windows_memory_is_written_anew_in_place(load, token_ids, replays):
    model, ids = load(SLIDING), token_ids(1, 62)
    expected = steps(model, ids, 8, 54)
    assert close(steps(bt.fuse(model), ids, 8, 54), expected)
    assert len(replays) == 53
    assert len(set(replays)) == 1  # though it was full three times


def test_a_full_tail_of_tables_is_sorted_between_steps(load, token_ids, replays, monkeypatch):
    monkeypatch.setattr(tables, "TAIL", 8)
    model, ids = load(LSH), token_ids(2, 47)
    expected = steps(model, ids, 7, 40, prompt_len=7)
    assert close(steps(bt.fuse(model), ids, 7, 40, prompt_len=7), expected)
    assert len(replays) >= 28
    assert 4 <= len(set(replays)) <= 6  # tables move in memory when they grow


def test_a_prompt_goes_on_densely_behind_generated_tokens(load, token_ids, replays):
    """Without ``prompt_len`` a token belongs to the prompt, whatever was generated before."""
    model, ids = load(LSH), token_ids(1, 40)

    def run(model):
        with torch.inference_mode():
            cache = model(ids[:, :12], use_cache=True).past_key_values
            found = [
                model(ids[:, t : t + 1], past_key_values=cache, **kwargs).logits
                for t, kwargs in enumerate([{"prompt_len": 12}] * 9 + [{}] * 9, start=12)
            ]
        return torch.cat(found, 1)

    expected = run(model)
    bt.set_attention(model, "full")
    dense = run(model)
    bt.set_attention(model, LSH)
    assert not close(expected[:, :9], dense[:, :9])
    assert close(run(bt.fuse(model)), expected)
    assert len(set(replays)) >= 2


def test_a_stream_starts_again_in_place(load, token_ids, replays, monkeypatch):
    model, ids = load(RECORDED["streaming"]), token_ids(2, 62)
    expected = steps(model, ids, 8, 54)
    monkeypatch.setattr(streaming, "REBASE_EVERY", 12)
    rebased = []
    rebase = streaming.StreamingLayer.rebase
    monkeypatch.setattr(
        streaming.StreamingLayer,
        "rebase",
        lambda layer, *args: (rebased.append(layer), rebase(layer, *args)),
    )
    assert close(steps(bt.fuse(model), ids, 8, 54), expected)
    assert len(rebased) >= 4
    assert len(replays) == 53
    assert len(set(replays)) == 1


@pytest.mark.parametrize("name", ["sliding", "mixed", "swaa", *PATTERNS, *BLOCKS, *SAMPLED])
def test_padding_on_the_left_changes_no_row(name, load, token_ids, replays):
    model = load(RECORDED[name])
    ids = torch.cat([PADDED, token_ids(2, 30)], 1)
    mask = torch.cat([MASK, torch.ones(2, 30, dtype=MASK.dtype)], 1)
    expected = steps(model, ids, 7, 30, mask, prompt_len=7)
    found = steps(bt.fuse(model), ids, 7, 30, mask, prompt_len=7)
    assert close(found, expected)
    alone = steps(model, ids[:1, 3:], 4, 30, prompt_len=4)
    assert close(found[:1], alone)
    assert replays


@pytest.mark.parametrize(
    "name", ["sliding", "mixed", "full decode", "swaa", *PATTERNS, *BLOCKS, *SAMPLED]
)
def test_generate_writes_the_same_tokens(name, load, replays):
    model = load(RECORDED[name])

    def generate(**kwargs):
        return model.generate(
            PADDED, attention_mask=MASK, max_new_tokens=24, eos_token_id=None, pad_token_id=0,
            do_sample=False, **kwargs,
        )  # fmt: skip

    expected, beams = generate(), generate(num_beams=2)
    bt.fuse(model)
    assert torch.equal(generate(), expected)
    assert len(replays) >= 18
    assert torch.equal(generate(num_beams=2), beams)


def test_tokens_of_a_prompt_are_read_by_its_mode(load, token_ids, replays):
    """One by one, before the prompt ends and after: only the latter are recorded."""
    model, ids = load(RECORDED["full decode"]), token_ids(2, 24)
    prompt_len = torch.tensor([12, 16])
    expected = steps(model, ids, 8, 16, prompt_len=prompt_len)
    assert close(steps(bt.fuse(model), ids, 8, 16, prompt_len=prompt_len), expected)
    assert len(replays) == 7  # from column 16 on, but for the step that finds the cache in place


@pytest.mark.parametrize("name", LAUNCHED)
def test_other_modes_are_launched_and_say_so_once(name, load, token_ids, replays, caplog):
    model, ids = load(LAUNCHED[name]), token_ids(2, 14)
    expected = steps(model, ids, 7, 7)
    bt.fuse(model)
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        assert close(steps(model, ids, 7, 7), expected)
    assert not replays
    (line,) = [r.message for r in caplog.records if "decode step" in r.message]
    assert line.startswith("BitNetModel launches each kernel of a decode step: attention ")
    assert "of layer 0: " in line


def test_assisted_generation_gives_the_same_tokens(load):
    model, assistant = load(SLIDING), load(SLIDING)
    kwargs = {
        "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "do_sample": False,
    }  # fmt: skip
    expected = model.generate(PADDED[1:], **kwargs)
    bt.fuse(model)
    bt.fuse(assistant)
    assert torch.equal(model.generate(PADDED[1:], assistant_model=assistant, **kwargs), expected)
