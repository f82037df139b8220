"""Every attention mode through a whole model: cached, uncached, in chunks, padded, generating."""

import json
import math
import zlib

import pytest
import torch
from transformers import DynamicCache

import bitnet_triton as bt
from bitnet_triton.attention import AttentionPlan, blocks
from bitnet_triton.attention.modes import lsh_sampling
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.quest import Quest
from bitnet_triton.attention.sampled import SamplingMode
from bitnet_triton.cache import GrowingLayer, SinkWindowLayer, StreamingLayer, streaming
from bitnet_triton.kernels.exact_attention import launchers
from bitnet_triton.kernels.lsh_sampling.reference import mean_direction
from bitnet_triton.kernels.native_sparse import launchers as sparse
from bitnet_triton.kernels.top_blocks import reference

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {"mode": "sliding", "window": 5, "sinks": 2}
STREAMING = {"mode": "streaming", "window": 5, "sinks": 2}
POOLED = {"mode": "pooled_blocks", "block": 4, "selected": 2, "initial": 0}
INDEXED = {"mode": "indexed_blocks", "block": 4, "selected": 2, "index_keys": "float"}
QUEST = {"mode": "quest", "page": 2, "budget": 6}
LSH = {"mode": "lsh_sampling", "bits": 2, "tables": 6, "sinks": 1, "recent": 2}
# so wide a bound that as many keys are drawn as tell their spread, and no page chosen by its bounds
VERIFIED = {
    "mode": "verified_sampling", "page": 2, "selected": 3, "local": 2, "base": 2, "epsilon": 0.99,
    "delta": 0.99,
}  # fmt: skip
SPARSE = {
    "mode": "native_sparse", "block": 4, "stride": 2, "selection": 4, "selected": 3, "window": 3,
}  # fmt: skip
MODES = {
    "full": "full",
    "sliding": SLIDING,
    "only itself": {"mode": "sliding", "window": 1},
    "streaming": STREAMING,
    "longformer": {"mode": "longformer", "window": [3, 4, 5, 3], "dilation": [1, 2, 1, 1]},
    "longformer, global": {"mode": "longformer", "window": 4, "global_tokens": [0, 7]},
    "local": {"mode": "local", "block": 4},
    "strided": {"mode": "strided", "block": 4},
    "fixed": {"mode": "fixed", "block": 4},
    "top_k": {"mode": "top_k", "keys": 3},
    "threshold": {"mode": "threshold", "share": 0.3},
    "pooled_blocks": POOLED,
    "pooled_blocks, windows": {
        "mode": "pooled_blocks",
        "block": 4,
        "selected": 2,
        "initial": 0,
        "window": 4,
        "stride": 2,
        "dense_below": 6,
    },
    "indexed_blocks": INDEXED,
    "indexed_blocks, codes": {**INDEXED, "index_keys": "int8", "dense_below": 6, "initial": 1},
    "indexed_blocks in decoding only": {"prefill": "full", "decode": INDEXED},
    "quest": QUEST,
    "quest, by head": {**QUEST, "per_head": True, "dense_below": 10},
    "quest in decoding only": {"prefill": "full", "decode": QUEST},
    "native_sparse": SPARSE,
    "native_sparse, own keys": {**SPARSE, "compression": "mlp", "shared_kv": False},
    "native_sparse, linear": {**SPARSE, "compression": "linear", "stride": 4, "initial": 0},
    "native_sparse in decoding only": {"prefill": "full", "decode": SPARSE},
    "native_sparse in prefill only": {
        "prefill": {**SPARSE, "compression": "mean"},
        "decode": {"mode": "sliding", "window": 5},
    },
    "blocks of two kinds": {"prefill": POOLED, "decode": ["full", INDEXED, QUEST]},
    "lsh_sampling": LSH,
    "lsh_sampling, union": {**LSH, "share": "union"},
    "lsh_sampling, proposal": {**LSH, "share": "proposal", "seed": 3},
    "lsh_sampling in decoding only": {"prefill": "full", "decode": ["full", LSH, LSH]},
    "verified_sampling": VERIFIED,
    "verified_sampling, signs": {**VERIFIED, "find": "signs"},
    "verified_sampling, signs in decoding only": {
        "prefill": "full",
        "decode": ["full", {**VERIFIED, "find": "signs"}, VERIFIED],
    },
    "swaa-untrained": {"preset": "swaa-untrained", "window": 5, "sinks": 2},
    "swaa-untrained-fast": {"preset": "swaa-untrained-fast", "window": 5, "sinks": 2},
    "swaa-trained-fast": {"preset": "swaa-trained-fast", "window": 5},
    "windows in decoding only": {"prefill": "full", "decode": {"mode": "sliding", "window": 4}},
    "all mixed": {
        "prefill": ["full", {"mode": "streaming", "window": 4}, {"mode": "sliding", "window": 3}],
        "decode": {"mode": "streaming", "window": 6},
    },
}
# a cache of transformers does not hold what they choose by
OWN_CACHE = [
    name
    for name, attention in MODES.items()
    if "indexed_blocks" in str(attention) or "shared_kv" in str(attention)
]
GENERATED_SAMPLE = (
    "lsh_sampling in decoding only", "verified_sampling, signs in decoding only",
)  # fmt: skip
# modes that see everything in 20 tokens, by what they are or by how large they are
DEGENERATE = {
    "sliding": {"mode": "sliding", "window": 20},
    "streaming": {"mode": "streaming", "window": 20},
    "streaming, sinks": {"mode": "streaming", "window": 12, "sinks": 8},
    "longformer": {"mode": "longformer", "window": 20},
    "longformer, global": {"mode": "longformer", "window": 1, "global_tokens": list(range(20))},
    "local": {"mode": "local", "block": 20},
    "strided": {"mode": "strided", "block": 1},
    "fixed": {"mode": "fixed", "block": 4, "summary": 4},
    "top_k": {"mode": "top_k", "keys": 20},
    "threshold": {"mode": "threshold", "share": 1e-30},
    "pooled_blocks": {"mode": "pooled_blocks", "block": 4, "selected": 5},
    "pooled_blocks, dense below": {"mode": "pooled_blocks", "dense_below": 20, "block": 1},
    "indexed_blocks": {"mode": "indexed_blocks", "block": 4, "selected": 5},
    "quest": {"mode": "quest", "page": 3, "budget": 21},
    "lsh_sampling": {"mode": "lsh_sampling", "recent": 20},
    "lsh_sampling, everything": {"mode": "lsh_sampling", "bits": 1, "tables": 200, "recent": 1},
    "verified_sampling": {"mode": "verified_sampling", "page": 4, "selected": 5},
    "verified_sampling, signs": {
        "mode": "verified_sampling",
        "page": 4,
        "selected": 5,
        "find": "signs",
    },
    "verified_sampling, drawn": {"mode": "verified_sampling", "page": 1, "selected": 4, "base": 16},
    "swaa, wide": {"preset": "swaa-untrained", "window": 20},
    "swaa, all layers full": {"preset": "swaa", "window": 2, "full_layers": "every-1"},
    "swaa, short prompt": {"preset": "swaa-untrained-fast", "window": 8, "sinks": 0},
}
T, PROMPT = 20, 8


@pytest.fixture(scope="module")
def build():
    """A function that builds a model with dense weights, always the same ones."""

    def make(attention, **changes):
        config = bt.BitNetConfig(**SIZES | changes, attention=attention, quantization_config=None)
        with torch.random.fork_rng():
            model = bt.BitNetForCausalLM(config)
            for name, parameter in model.named_parameters():
                # whatever else a mode brings, the model has the same weights
                torch.manual_seed(zlib.crc32(name.encode()))
                mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
                torch.nn.init.normal_(parameter, mean, 1.0 if "embed" in name else std)
        return model.eval()

    return make


@pytest.fixture
def padded(request, build, draw_clear):
    """Ids and mask; the first row begins with padding."""

    def draw():
        ids = torch.randint(3, 96, (2, T))
        ids[0, :5] = 0
        return ids, (ids != 0).long()

    callspec = getattr(request.node, "callspec", None)
    mode = MODES.get(callspec.params.get("name")) if callspec else None
    return draw() if mode is None else draw_clear(draw, lambda x: key_distance(build(mode), *x))


def positions(model, mask):
    """Bounds by channel and codes depend on the angles of keys: then positions go by the text, as
    generate has them. Other modes see differences of positions alone.
    """
    plan = model.attention_plan or ()
    if mask is None or not any(isinstance(mode, (Quest, SamplingMode)) for mode in plan):
        return None
    return (mask.cumsum(-1) - 1).clamp_min(0)


def run(model, ids, mask=None, chunks=(), **kwargs):
    """Return logits [B T vocabulary], at once without a cache or in chunks with one."""
    place = positions(model, mask)
    if not chunks:
        with torch.no_grad():
            return model(
                ids, attention_mask=mask, position_ids=place, use_cache=False, **kwargs
            ).logits
    cache, outs, start = None, [], 0
    for size in chunks:
        end = start + size
        with torch.no_grad():
            out = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if place is None else place[:, start:end],
                past_key_values=cache,
                use_cache=True,
                **kwargs,
            )
        cache, start = out.past_key_values, end
        outs.append(out.logits)
    return torch.cat(outs, dim=1)


def key_distance(model, ids, mask=None):
    """Return how far the scores of all keys are from being selected, or not, by a mode."""
    distances, select = [torch.tensor(torch.inf)], launchers.select_reference

    def look(scores, visible, *, top_k, threshold):
        kept = select(scores, visible, top_k=top_k, threshold=threshold)
        if top_k is not None:
            least = scores.masked_fill(~kept, torch.inf).amin(-1)
            left = scores.masked_fill(kept | ~visible, -torch.inf).amax(-1)
            distances.append((least - left).min())
        if threshold is not None:
            seen = scores.masked_fill(~visible, -torch.inf)
            weights = seen - seen.amax(-1, keepdim=True)
            distances.append((weights - math.log(threshold)).abs()[visible.expand_as(seen)].min())
        return kept

    def look_at_blocks(q, keys, **settings):
        distances.append(block_distance(q, keys, **settings))
        return choose(q, keys, **settings)

    def look_at_sparse(scores, *, blocks, before):
        chosen = choose_sparse(scores, blocks=blocks, before=before)
        distances.append(sparse_distance(scores, chosen, blocks, before))
        return chosen

    def look_at_sides(q, k, v, tables, **settings):
        asked = mean_direction(q.unflatten(2, (tables.keys.shape[2], -1))[:, 0].transpose(1, 2))
        for x in (q, asked, tables.keys - tables.centre[:, None]):
            sides = torch.einsum("...d,kld->...kl", x, tables.planes)
            # of the size of a cosine, which rounding moves less than a score
            distances.append(10 * (sides.abs() / x.norm(dim=-1)[..., None, None]).min())
        return attend(q, k, v, tables, **settings)

    choose, choose_sparse = blocks.top_blocks, sparse.select_reference
    attend = lsh_sampling.lsh_sampling_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "select_reference", look)
        patch.setattr(blocks, "top_blocks", look_at_blocks)
        patch.setattr(sparse, "select_reference", look_at_sparse)
        patch.setattr(lsh_sampling, "lsh_sampling_attention", look_at_sides)
        with bt.use_backend("reference"):  # kernels choose where nobody can look
            run(model, ids, mask, prompt_len=PROMPT)
    return torch.stack(distances).min().item()


def block_distance(
    q, keys, *, units, block, selected, initial, local, tokens, leftpad, scale, sets=None
):
    """Return how far the scores of chosen blocks are from those of others."""
    found, bounds = [torch.tensor(torch.inf)], units.kind == "bounds"
    for b in range(len(q)):
        left = 0 if leftpad is None else int(leftpad[b])
        rows = keys[b, left // units.stride :] * (1 if scale is None else scale[b, left:, :, None])
        scores = reference.unit_scores(q[b], rows.float(), sets=sets or q.shape[2], bounds=bounds)
        positions = torch.arange(tokens - q.shape[1], tokens) - left
        best = reference.block_scores(scores, positions, units=units, block=block)
        own, index = (positions // block)[:, None, None], torch.arange(best.shape[-1])
        best = best.masked_fill((index < initial) | (index > own - local), torch.inf)
        best = best.masked_fill(index > own, -torch.inf).sort(-1, descending=True).values
        if best.shape[-1] > selected:
            least, next_one = best[..., selected - 1], best[..., selected]
            gap = (least - next_one)[least.isfinite() & next_one.isfinite()]
            found.append(gap[gap > 0])  # none: of one window that reaches into both blocks
    return torch.cat([t.flatten() for t in found]).min()


def sparse_distance(scores, chosen, blocks, before):
    """Return how far importance [B Hk T N] of chosen blocks [B T Hk S] is from that of others."""
    own = (torch.arange(scores.shape[2]) + before)[:, None] // blocks.selection
    j = torch.arange(scores.shape[-1])
    forced, future = (j < blocks.initial) | (j > own - blocks.local), j > own
    taken = (chosen.transpose(1, 2)[..., None] == j).any(-2)
    least = scores.masked_fill(~taken | forced, torch.inf).amin(-1)
    left = scores.masked_fill(taken | forced | future, -torch.inf).amax(-1)
    gap = (least - left)[least.isfinite() & left.isfinite()]
    return torch.cat([gap, gap.new_tensor([torch.inf])]).min()


CHUNKS = [[T], [7, 1, 5, 7], [PROMPT, *[1] * (T - PROMPT)], [1] * T]


@pytest.mark.parametrize("chunks", CHUNKS, ids=["at once", "chunks", "generating", "by token"])
@pytest.mark.parametrize("name", MODES)
def test_a_cache_changes_nothing(name, chunks, build, padded, error):
    model, (ids, mask) = build(MODES[name]), padded
    whole = run(model, ids, mask, prompt_len=PROMPT)
    parts = run(model, ids, mask, chunks, prompt_len=PROMPT)
    assert error(parts[mask.bool()], whole[mask.bool()]) <= 2e-5


@pytest.mark.parametrize("name", ["sliding", "streaming", "longformer", "swaa-untrained"])
def test_a_cache_of_transformers_serves_as_well(name, build, padded, error):
    model, (ids, mask) = build(MODES[name]), padded
    whole = run(model, ids, mask, prompt_len=PROMPT)
    cache, outs = DynamicCache(), []
    for start, end in ((0, 6), (6, 7), (7, T)):
        with torch.no_grad():
            out = model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                prompt_len=PROMPT,
            )  # fmt: skip
        outs.append(out.logits)
    assert error(torch.cat(outs, dim=1)[mask.bool()], whole[mask.bool()]) <= 2e-5


@pytest.mark.parametrize("name", MODES)
def test_padding_does_not_change_other_rows(name, build, padded, error):
    model, (ids, mask) = build(MODES[name]), padded
    together = run(model, ids, mask, prompt_len=PROMPT)
    alone = run(model, ids[:1, 5:], prompt_len=PROMPT - 5)
    assert error(together[:1, 5:], alone) <= 2e-5
    assert error(together[1:], run(model, ids[1:], prompt_len=PROMPT)) <= 2e-5


@pytest.mark.parametrize("name", MODES)
def test_padding_on_the_right_changes_nothing(name, build, draw_clear, error):
    model, mask = build(MODES[name]), torch.ones(2, T, dtype=torch.long)
    mask[0, 13:] = 0
    ids = draw_clear(
        lambda: torch.randint(3, 96, (2, T)), lambda ids: key_distance(model, ids, mask)
    )
    together = run(model, ids, mask, prompt_len=PROMPT)
    assert error(together[:1, :13], run(model, ids[:1, :13], prompt_len=PROMPT)) <= 2e-5


@pytest.mark.parametrize("chunks", [(), [PROMPT, *[1] * (T - PROMPT)]], ids=["at once", "by token"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_mode_that_sees_everything_is_full_attention(name, chunks, build, padded, error):
    ids, mask = padded
    got = run(build(DEGENERATE[name]), ids, mask, chunks, prompt_len=PROMPT)
    expected = run(build("full"), ids, mask, chunks, prompt_len=PROMPT)
    assert error(got[mask.bool()], expected[mask.bool()]) <= 2e-5


@pytest.mark.parametrize("name", [name for name in MODES if name != "full"])
def test_a_mode_that_does_not_is_not(name, build, padded, error):
    ids, mask = padded
    # a long prompt: of the short one a window hides a single key, whose weight may be next to none
    got = run(build(MODES[name]), ids, mask, prompt_len=14)
    assert error(got[mask.bool()], run(build("full"), ids, mask)[mask.bool()]) > 1e-2


@pytest.mark.parametrize("name", MODES)
def test_generation_is_one_forward_however_it_is_cached(name, build, draw_clear, token_distance):
    model, left = build(MODES[name]), torch.ones(2, PROMPT, dtype=torch.long)
    left[0, :5] = 0
    whole = torch.nn.functional.pad(left, (0, 9), value=1)
    kwargs = {
        "attention_mask": left, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None,
    }  # fmt: skip

    def distance(ids):
        output = model.generate(ids, **kwargs)
        logits = run(model, output, whole, prompt_len=PROMPT)[:, PROMPT - 1 : -1]
        keys = key_distance(model, output, whole)
        return min(keys, token_distance(logits, output[:, PROMPT:]))

    ids = draw_clear(lambda: torch.randint(3, 96, (2, PROMPT)) * left, distance)
    output = model.generate(ids, **kwargs)
    best = run(model, output, whole, prompt_len=PROMPT).argmax(-1)
    assert torch.equal(output[:, PROMPT:], best[:, PROMPT - 1 : -1])
    for settings in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ):
        if name in OWN_CACHE and "cache_implementation" in settings:
            continue
        assert torch.equal(model.generate(ids, **kwargs, **settings), output), settings


BEAMS = ["full", "sliding", "streaming", "swaa-trained-fast", "all mixed", "lsh_sampling"]


@pytest.mark.parametrize("name", [*BEAMS, "verified_sampling", "verified_sampling, signs"])
def test_beams_take_their_tokens_along(name, build, padded):
    model, (ids, mask) = build(MODES[name]), padded
    kwargs = {
        "attention_mask": mask[:, :PROMPT], "max_new_tokens": 9, "do_sample": False,
        "num_beams": 3, "eos_token_id": None,
    }  # fmt: skip
    cached = model.generate(ids[:, :PROMPT], **kwargs)
    assert torch.equal(cached, model.generate(ids[:, :PROMPT], use_cache=False, **kwargs))


@pytest.mark.parametrize("helper", ["same", "full", "narrow", "prompt"])
@pytest.mark.parametrize(
    "name",
    ["sliding", "streaming", "swaa-untrained", "swaa-trained-fast", "lsh_sampling"],
)
def test_speculation_changes_nothing(name, helper, build, token_ids, draw_clear, token_distance):
    model = build(MODES[name])
    # long enough for windows to have dropped something; transformers takes pad tokens that a helper
    # reads for padding
    kwargs = {
        "max_new_tokens": 44, "do_sample": False, "eos_token_id": None, "suppress_tokens": [0],
    }  # fmt: skip

    def distance(ids):
        output = model.generate(ids, **kwargs)
        logits = run(model, output, prompt_len=PROMPT)[:, PROMPT - 1 : -1]
        return token_distance(logits, output[:, PROMPT:])

    # a half twice: something for the lookup in the prompt to find
    ids = draw_clear(lambda: token_ids(1, PROMPT // 2).repeat(1, 2), distance)
    plain = model.generate(ids, **kwargs)
    if helper == "prompt":
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **kwargs), plain)
        return
    # a helper with another window errs now and then: its tokens are taken back
    narrow = {"mode": "sliding", "window": 3, "sinks": 1}
    assistant = build({"same": MODES[name], "full": None, "narrow": narrow}[helper])
    assert torch.equal(model.generate(ids, assistant_model=assistant, **kwargs), plain)


@pytest.mark.parametrize("name", MODES)
def test_a_checkpoint_remembers_its_attention(name, build, tmp_path, token_ids):
    model = build(MODES[name])
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["attention"]
    assert written == again.config.attention == model.config.attention
    assert again.attention_plan == AttentionPlan.from_config(MODES[name], 3)
    ids = token_ids(1, T)
    assert torch.equal(run(again, ids), run(model, ids))


@pytest.mark.parametrize(
    ("attention", "kinds"),
    [
        (None, [GrowingLayer] * 3),
        ("full", [GrowingLayer] * 3),
        (SLIDING, [SinkWindowLayer] * 3),
        (STREAMING, [StreamingLayer] * 3),
        ({"preset": "swaa-trained-fast"}, [SinkWindowLayer, GrowingLayer, SinkWindowLayer]),
        ("swaa-untrained", [GrowingLayer] * 3),
        (MODES["all mixed"], [GrowingLayer, StreamingLayer, SinkWindowLayer]),
        (MODES["longformer, global"], [GrowingLayer] * 3),
    ],
)
def test_layers_hold_what_their_modes_can_see(attention, kinds, build, token_ids):
    model = build(attention)
    with torch.no_grad():
        cache = model(token_ids(1, 4), use_cache=True).past_key_values
        assert [type(layer) for layer in cache.layers] == kinds
        output = model.generate(
            token_ids(1, 4), max_new_tokens=2, return_dict_in_generate=True, do_sample=False
        )
    assert [type(layer) for layer in output.past_key_values.layers] == kinds


@pytest.mark.parametrize("attention", [SLIDING, STREAMING], ids=["sliding", "streaming"])
def test_memory_does_not_grow_with_the_text(attention, build, token_ids):
    model = build(attention)
    with torch.no_grad():
        cache = model(token_ids(1, 400), use_cache=True).past_key_values
        held = []
        for _ in range(60):
            model(token_ids(1, 1), past_key_values=cache)
            held.append(sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers))
    assert max(held) <= 3 * 2 * 16 * 4 * (7 + 16)  # layers, heads, D, bytes, tokens


@pytest.mark.parametrize("attention", [SLIDING, STREAMING], ids=["sliding", "streaming"])
def test_what_was_evicted_has_no_influence(attention, build, token_ids):
    model = build(attention, num_hidden_layers=1)  # further layers carry what they saw along
    ids = token_ids(1, T)
    expected = run(model, ids, chunks=[T - 1, 1])[:, -1]
    ids[:, 2 : T - 5] = token_ids(1, T - 7)
    assert torch.equal(run(model, ids, chunks=[T - 1, 1])[:, -1], expected)
    ids[:, 1] = (ids[:, 1] - 2) % 90 + 3
    assert not torch.equal(run(model, ids, chunks=[T - 1, 1])[:, -1], expected)


def test_positions_of_a_stream_stay_small(build, token_ids, monkeypatch, error):
    monkeypatch.setattr(streaming, "REBASE_EVERY", 16)
    model, largest = build(STREAMING), []
    look = lambda m, args, kwargs: largest.append(int(kwargs["position_ids"].max()))  # noqa: E731
    model.model.rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.randint(3, 96, (2, 150))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    parts = run(model, ids, mask, [12, *[1] * 138])
    assert max(largest) < 16 + 7 + 12
    whole = run(model, ids, mask)
    assert error(parts[mask.bool()], whole[mask.bool()]) <= 1e-4


def test_a_second_turn_is_a_prompt_again(build, token_ids):
    """By phase: new tokens of a user are windowed, those that were generated are not."""
    model = build({"preset": "swaa-untrained-fast", "window": 3, "sinks": 1})
    first = model.generate(
        token_ids(1, PROMPT), max_new_tokens=6, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, suppress_tokens=[0],
    )  # fmt: skip
    for new in (1, 4):
        ids = torch.cat([first.sequences, token_ids(1, new)], dim=1)
        cache = first.past_key_values
        length = cache.get_seq_length()
        second = model.generate(
            ids, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        # the same by hand: turn 1, its answer, turn 2
        with torch.no_grad():
            out = model(ids[:, :PROMPT], use_cache=True)
            out = model(ids[:, PROMPT:length], past_key_values=out.past_key_values, prompt_len=0)
            out = model(ids[:, length:], past_key_values=out.past_key_values)
        torch.testing.assert_close(second.logits[0], out.logits[:, -1])
        cache.crop(length - cache.get_seq_length())


def test_labels_say_where_prompts_end(build, token_ids):
    model, ids = build({"preset": "swaa-untrained", "window": 3, "sinks": 1}), token_ids(3, T)
    labels = ids.clone()
    for row, prompt in enumerate((4, 11, T)):
        labels[row, :prompt] = -100
    trained = model.train()(ids, labels=labels)
    assert trained.loss.requires_grad
    expected = model(ids, prompt_len=torch.tensor([4, 11, T])).logits
    assert torch.equal(trained.logits, expected)
    assert not torch.allclose(model(ids).logits[0], expected[0])


def test_labels_say_where_the_prompts_of_packed_sequences_end(build, token_ids):
    model, ids = build({"preset": "swaa-untrained", "window": 3, "sinks": 1}), token_ids(1, T)
    places = torch.cat([torch.arange(9), torch.arange(T - 9)])[None]
    labels = ids.clone()
    labels[:, :4], labels[:, 9:15] = -100, -100
    packed = model(ids, labels=labels, position_ids=places, use_cache=False).logits
    for start, end, prompt in ((0, 9, 4), (9, T, 6)):
        alone = model(ids[:, start:end], prompt_len=prompt).logits
        torch.testing.assert_close(packed[:, start:end], alone)
        assert not torch.allclose(packed[:, start:end], model(ids[:, start:end]).logits)


# tokens that are generated, of which these sample, have no gradient
@pytest.mark.parametrize("name", [n for n in MODES if n not in GENERATED_SAMPLE])
def test_training_reaches_every_parameter(name, build, token_ids):
    model, ids = build(MODES[name]).train(), token_ids(2, T)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    model(ids, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_answers_that_are_sampled_cannot_be_trained(build, token_ids):
    model, ids = build(MODES["lsh_sampling in decoding only"]).train(), token_ids(2, T)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    with pytest.raises(ValueError, match="`attention`: 'lsh_sampling' samples, which has no grad"):
        model(ids, labels=labels)


@pytest.mark.parametrize("name", ["sliding", "streaming", "swaa-untrained", "all mixed"])
def test_recomputed_activations_give_the_same_gradients(name, build, token_ids):
    model, ids = build(MODES[name]).train(), token_ids(2, T)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(one, two) for one, two in zip(*grads))


@pytest.mark.parametrize("name", ["sliding", "streaming", "swaa-untrained"])
def test_autocast_trains(name, build, token_ids):
    model, ids = build(MODES[name]).train(), token_ids(2, T)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=5e-2, atol=0)


@pytest.mark.parametrize("name", ["sliding", "swaa-untrained"])
def test_kernels_give_what_the_reference_gives(name, build, padded, error, default_backend):
    model, (ids, mask) = build(MODES[name]), padded
    got = [run(model, ids, mask, chunks, prompt_len=PROMPT) for chunks in ([], CHUNKS[1])]
    with bt.use_backend("reference"):
        expected = run(model, ids, mask, prompt_len=PROMPT)
    for value in got:
        assert error(value[mask.bool()], expected[mask.bool()]) <= 1e-4


@pytest.mark.parametrize("attention", [None, SLIDING], ids=["no plan", "plan"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_len": -1}, ValueError, "`prompt_len`: expected at least 0, got -1"),
        ({"prompt_len": 1.0}, TypeError, "`prompt_len`: expected an integer, got float"),
        (
            {"prompt_len": torch.ones(3)},
            ValueError,
            r"`prompt_len`: expected integers \[B\] with B=2, got torch.float32 \[3\]",
        ),
        (
            {"global_tokens": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            "`global_tokens`: expected attention 'longformer' with 'global_mask'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message, attention, build, token_ids):
    model = build(attention)
    if attention is None:
        error, message = ValueError, f"`{next(iter(arguments))}`: expected a model with `config.at"
    with pytest.raises(error, match=message):
        model(token_ids(2, 4), **arguments)


def test_another_attention_is_refused_and_not_run_in_silence(build, token_ids):
    model, refused = build(SLIDING), "`attn_implementation`: expected none beside `config"
    with pytest.raises(ValueError, match=f"{refused}.attention`, got 'eager'"):
        model.set_attn_implementation("eager")
    model.set_attn_implementation(model.config._attn_implementation)
    model(token_ids(2, 4))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=f"{refused}.attention`, got 'sdpa'"):
        model(token_ids(2, 4))


def test_padding_between_tokens_is_refused_but_by_full_attention(build, token_ids):
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="'sliding' takes padding on one side of a row"):
        build(SLIDING)(ids, attention_mask=mask)
    full, plain = (
        build(attention)(ids, attention_mask=mask).logits for attention in ("full", None)
    )
    torch.testing.assert_close(full[:, 3:], plain[:, 3:])


def test_a_stream_counts_positions_itself(build, token_ids):
    with pytest.raises(ValueError, match="`position_ids`: attention 'streaming' counts"):
        build(STREAMING)(token_ids(1, 4), position_ids=torch.arange(4)[None])


def test_global_tokens_can_be_named_in_a_call(build, padded, error):
    model = build({"mode": "longformer", "window": 2, "global_mask": True})
    ids, mask = padded
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[:, 6] = True
    whole = run(model, ids, mask, global_tokens=chosen)
    parts = run(model, ids, mask, [PROMPT, 1, 1, 10], global_tokens=chosen)
    assert error(parts[mask.bool()], whole[mask.bool()]) <= 2e-5
    assert error(run(model, ids, mask)[mask.bool()], whole[mask.bool()]) > 1e-2
    by_position = build({"mode": "longformer", "window": 2, "global_tokens": [6]})
    assert error(run(by_position, ids[1:]), whole[1:]) <= 2e-5
    output = model.generate(
        ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], global_tokens=chosen[:, :PROMPT],
        max_new_tokens=5, do_sample=False, num_beams=2, eos_token_id=None,
    )  # fmt: skip
    assert output.shape == (2, PROMPT + 5)


def test_each_layer_of_a_plan_is_the_mode_itself(build):
    model = build({"preset": "swaa-untrained", "window": 5})
    plans = {id(layer.self_attn.attention_plan) for layer in model.model.layers}
    assert plans == {id(model.attention_plan)}
    assert model.attention_plan.mode(1, "prefill") == Full()


@pytest.mark.parametrize("name", ["sliding", "swaa-untrained-fast", "all mixed"])
def test_no_mode_breaks_a_graph(name, build, token_ids, error):
    model, ids = build(MODES[name]), token_ids(2, T)
    expected = run(model, ids, prompt_len=PROMPT)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(run(compiled, ids, prompt_len=PROMPT), expected) <= 1e-5
    torch.compiler.reset()
