"""Modes of shared queries and keys: caches, padding, checkpoints, and what they refuse."""

import copy

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention.buckets import BucketMode
from bitnet_triton.attention.modes.reformer import Reformer
from bitnet_triton.attention.modes.routing import Centroids
from bitnet_triton.cache import BucketsLayer
from bitnet_triton.models.fused.recording import Recording

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
REFORMER = {"mode": "reformer", "rounds": 2, "buckets": 4, "window": 4}
ROUTING = {"mode": "routing", "clusters": 3, "window": 4}
MODES = {
    "reformer": REFORMER,
    "routing": ROUTING,
    "by layer": {"prefill": ["full", REFORMER], "decode": ["full", REFORMER]},
    "in decoding only": {"prefill": "full", "decode": REFORMER},
}
T, PROMPT = 24, 10

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def build(monkeypatch):
    """A function that builds a model with dense weights, always the same ones.

    Its layers hash in float64: rounding that differs with the number of rows moves no token then.
    """
    from bitnet_triton.kernels.lsh_attention import buckets

    def exact(x, rounds, count, seed):
        rotated_by = buckets.rotations(x.shape[-1], rounds, count, seed, x.device).double()
        halves = (x.double() @ rotated_by).unflatten(-1, (rounds, count // 2))
        return torch.cat([halves, -halves], -1).argmax(-1).int()

    monkeypatch.setattr(buckets, "_buckets", exact)

    def make(attention, **changes):
        config = bt.BitNetConfig(**SIZES | changes, attention=attention, quantization_config=None)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = bt.BitNetForCausalLM(config)
            for name, parameter in model.named_parameters():
                mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
                torch.nn.init.normal_(parameter, mean, 1.0 if "embed" in name else std)
        return model.eval()

    return make


def run(model, ids, mask=None, chunks=(), **kwargs):
    """Return logits, at once without a cache or in chunks with one; positions go by the text."""
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    cache, outs, start = None, [], 0
    for size in chunks or [ids.shape[1]]:
        end = start + size
        with torch.no_grad():
            out = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if place is None else place[:, start:end],
                past_key_values=cache, use_cache=bool(chunks), **kwargs,
            )  # fmt: skip
        cache, start = out.past_key_values, end
        outs.append(out.logits)
    return torch.cat(outs, 1)


def drawn(rows=2):
    return torch.randint(3, 96, (rows, T))


@pytest.mark.parametrize("chunks", [[T], [7, 1, 5, 11], [1] * T], ids=["once", "chunks", "token"])
@pytest.mark.parametrize("name", MODES)
def test_a_cache_changes_nothing(name, chunks, build):
    model, ids = build(MODES[name]), drawn()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = run(model, ids, mask, prompt_len=PROMPT)
    got = run(model, ids, mask, chunks, prompt_len=PROMPT)
    seen = mask.bool()
    torch.testing.assert_close(got[seen], whole[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODES)
def test_padding_does_not_change_other_rows(name, build):
    model, ids = build(MODES[name]), drawn()
    alone = run(model, ids[:, 5:])
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    torch.testing.assert_close(run(model, ids, mask)[:, 5:], alone, rtol=1e-3, atol=1e-3)
    right = mask.flip(1)
    kept = run(model, ids, right)[:, :-5]
    torch.testing.assert_close(kept, run(model, ids[:, :-5]), rtol=1e-3, atol=1e-3)


def test_packed_texts_read_each_for_itself(build):
    model, ids = build(REFORMER), drawn(1)
    place = torch.cat([torch.arange(9), torch.arange(T - 9)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=place, use_cache=False).logits
    for part in (slice(0, 9), slice(9, T)):
        torch.testing.assert_close(packed[:, part], run(model, ids[:, part]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["reformer", "routing"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_needs_no_cache(name, beams, build):
    model, ids = build(MODES[name]), drawn()[:, :PROMPT]
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, plain)


def test_tokens_that_are_taken_back_leave_nothing(build):
    model, ids = build(REFORMER), drawn()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-10)
        again = model(ids[:, T - 10 :], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, run(model, ids)[:, T - 10 :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", [REFORMER, ROUTING, {**REFORMER, "pattern": "chunk"}])
def test_a_checkpoint_remembers_its_attention(attention, build, tmp_path):
    model, ids = build(attention), drawn()
    if attention is ROUTING:
        model.model.layers[0].self_attn.routing.centroids.normal_()
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert again.attention_plan == model.attention_plan
    torch.testing.assert_close(run(again, ids), run(model, ids))


def test_a_window_of_everything_in_few_buckets_is_not_one_of_little(build):
    ids = drawn()
    wide = run(build({**REFORMER, "rounds": 60, "buckets": 2, "window": T}), ids)
    more = run(build({**REFORMER, "rounds": 80, "buckets": 2, "window": T}), ids)
    few = run(build({**REFORMER, "rounds": 1}), ids)
    torch.testing.assert_close(wide, more, rtol=1e-3, atol=1e-3)  # all of it was found
    assert (few - wide).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["reformer", "routing"])
def test_training_reaches_what_is_read(name, build):
    model, ids = build(MODES[name]).train(), drawn()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, p in model.named_parameters():
        assert (p.grad is None or not p.grad.any()) == ("q_proj" in parameter), parameter


def test_centroids_follow_their_members_in_training_alone(build):
    model, ids = build({**ROUTING, "decay": 0.5}), drawn()
    centroids = model.model.layers[0].self_attn.routing.centroids
    before = centroids.clone()
    run(model, ids)
    assert torch.equal(centroids, before)
    model.train()(ids, use_cache=False)
    assert not torch.equal(centroids, before)
    module = Centroids(1, 2, 2)
    module.centroids.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    x = torch.tensor([3.0, 0.1, 0.2, 2.0, 5.0, 0.0]).view(1, 3, 1, 2)
    assert module.nearest(x).flatten().tolist() == [0, 1, 0]
    module.follow(x, module.nearest(x), 0.0)
    unit = torch.nn.functional.normalize(x, dim=-1)[0, :, 0]
    torch.testing.assert_close(module.centroids[0], torch.stack([unit[::2].mean(0), unit[1]]))


@pytest.mark.parametrize("mode", ["reformer", "routing"])
def test_heads_that_share_keys_are_refused(mode):
    with pytest.raises(ValueError, match="as many heads of keys as of queries, got 2 and 4"):
        bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES | {"num_key_value_heads": 2}, attention=mode))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"mode": "reformer", "buckets": 3}, "even number"),
        ({"mode": "reformer", "pattern": "block"}, "'pattern' out of"),
        ({"mode": "reformer", "rounds": 0}, "'rounds': expected at least 1"),
        ({"mode": "routing", "decay": 2}, "'decay': expected 0 up to 1"),
        ({"mode": "routing", "clusters": 0}, "'clusters': expected at least 1"),
    ],
)
def test_settings_out_of_range_are_named(attention, message):
    with pytest.raises(ValueError, match=message):
        bt.BitNetConfig(**SIZES, attention=attention)


def test_published_chunks_go_without_a_cache(build):
    model, ids = build({**REFORMER, "pattern": "chunk"}), drawn()
    with pytest.raises(ValueError, match="'chunk' goes without a cache"):
        run(model, ids, None, [10, 14])


def test_it_tells_that_queries_are_not_read(build, caplog):
    from bitnet_triton.attention import buckets

    buckets._tell.cache_clear()
    with caplog.at_level("WARNING", logger="bitnet_triton"):
        build(REFORMER)
    assert "q_proj" in caplog.text
    assert issubclass(type(build(REFORMER).attention_plan.prefill[0]), BucketMode)


@pytest.fixture
def hashed(monkeypatch):
    """How many tokens were hashed outside of recorded steps, layer by layer and call by call."""
    counts = []
    buckets_of = Reformer.buckets_of

    def count(mode, qk, context):
        counts.append(qk.shape[1])
        return buckets_of(mode, qk, context)

    monkeypatch.setattr(Reformer, "buckets_of", count)
    return counts


def test_each_key_is_hashed_once(build, hashed):
    model, ids = build(REFORMER), drawn()
    run(model, ids, None, [7, 1, 5, 1, 10])
    assert hashed == [7, 7, 1, 1, 5, 5, 1, 1, 10, 10]


def test_what_a_memory_keeps_of_buckets_follows_its_keys(build, hashed):
    """Beams, repeats, crops and keys that somebody replaces: numbers are those of the keys."""
    model, ids = build(REFORMER), drawn(3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert hashed == [T, T]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    cache.crop(-4)
    del hashed[:]
    rest = torch.randint(3, 96, (3, 5))
    texts = torch.cat([ids[[1, 2, 0], : T - 4], rest], 1)
    with torch.no_grad():
        copied = copy.deepcopy(cache)
        got = model(rest, past_key_values=cache, use_cache=True).logits
        assert hashed == [5, 5]
        whole = run(model, texts)[:, T - 4 :]
        torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-3)
        for layer in copied.layers:
            layer.keys = layer.keys.clone()
        del hashed[:]
        got = model(rest, past_key_values=copied, use_cache=True).logits
    assert hashed == [T + 1, T + 1]
    torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-3)


def test_a_cache_of_other_settings_is_hashed_anew(build):
    model, ids = build(REFORMER), drawn()
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        bt.set_attention(model, {**REFORMER, "seed": 3})
        got = model(ids[:, 20:], past_key_values=cache, use_cache=True).logits
    cut = build({"prefill": REFORMER, "decode": {**REFORMER, "seed": 3}})
    whole = run(cut, ids, None, [20, 4], prompt_len=20)[:, 20:]
    torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-3)


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


RECORDED = {
    **MODES,
    "two factors": {**REFORMER, "buckets": 132},
    "another seed": {"prefill": REFORMER, "decode": {**REFORMER, "seed": 5, "window": 3}},
    "full in decoding": {"prefill": REFORMER, "decode": "full"},
}
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30, 7], [1, 5, 23, 71, 8, 40, 6]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


@pytest.fixture
def packed(checkpoint):
    def load(attention):
        heads = checkpoint(config='{"num_key_value_heads": 4}')
        model = bt.BitNetForCausalLM.from_pretrained(heads, fuse=False)
        return bt.set_attention(model, attention)

    return load


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_give_what_the_mode_does(name, packed, replays, hashed):
    model = packed(RECORDED[name])
    ids = torch.cat([PADDED, torch.randint(3, 96, (2, 40))], 1)
    mask = torch.cat([MASK, torch.ones(2, 40, dtype=MASK.dtype)], 1)
    chunks = [7] + [1] * 40
    expected = run(model, ids, mask, chunks, prompt_len=7)
    assert not replays
    del hashed[:]
    with torch.inference_mode():
        found = run(bt.fuse(model), ids, mask, chunks, prompt_len=7)
    assert len(replays) >= 38
    assert len(set(replays)) <= 2
    # by both modes of the prompt, and by the step that finds the cache in place
    assert sum(hashed) <= 2 * (7 + 7 + 1)
    # a code beside a tie may fall to its other side, and a key into another bucket: seldom
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error[mask.bool()] <= 1e-3).float().mean() >= 0.9


@pytest.mark.parametrize("name", ["reformer", "routing", "in decoding only"])
def test_recorded_generation_writes_the_same_tokens(name, packed, replays):
    model = packed(MODES[name])

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


def test_a_saved_cache_goes_on(packed, tmp_path):
    model, ids = packed(REFORMER), torch.cat([PADDED[1:], drawn(1)], 1)
    with torch.inference_mode():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        bt.save_cache(model, cache, tmp_path / "cache.safetensors")
        again = bt.load_cache(model, tmp_path / "cache.safetensors")
        assert all(isinstance(layer, BucketsLayer) for layer in again.layers)
        expected, found = (
            model(ids[:, 20:], past_key_values=c, use_cache=True).logits for c in (cache, again)
        )
    torch.testing.assert_close(found, expected)
