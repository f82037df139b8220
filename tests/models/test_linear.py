"""The mode linear in whole models: its state, its recorded step, hybrids with layers that keep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from transformers.cache_utils import DynamicCache

import bitnet_triton as bt
from bitnet_triton.attention import Mode
from bitnet_triton.attention.linear_parts import FEATURE_MAPS
from bitnet_triton.attention.modes.linear import Linear
from bitnet_triton.cache import GrowingLayer, StateLayer
from bitnet_triton.kernels.linear_attention.reference import recurrent_reference
from bitnet_triton.models.fused.layer import FusedDecoderLayer
from bitnet_triton.models.fused.recording import Recording

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
H, HK, D = 4, 2, 16
GATED = {"mode": "linear"}
KDA = {"mode": "linear", "form": "kda"}
BARE = {"mode": "linear", "convolution": 1}
PLAIN = {"mode": "linear", "form": "plain"}
HEDGEHOG = {**PLAIN, "feature_map": "hedgehog", "decay": "retnet"}
_LAYERS = [GATED, "full", KDA]
HYBRID = {"prefill": _LAYERS, "decode": _LAYERS}
ATTENTION = {
    "gated": GATED, "kda": KDA, "bare": BARE, "elu": PLAIN, "hedgehog": HEDGEHOG,
    "performer": {**PLAIN, "feature_map": "performer"}, "hybrid": HYBRID,
}  # fmt: skip
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30, 7], [1, 5, 23, 71, 8, 40, 6]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])

pytestmark = pytest.mark.usefixtures("default_backend")
every = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)


def changed(attention, **sizes):
    """Return a model whose parameters, those of the mode too, are not where they start."""
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES | sizes, attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def dense(attention, **sizes):
    """Without quantised activations, in which nothing small becomes large."""
    return changed(attention, quantization_config=None, **sizes).eval()


@pytest.fixture
def folder(tmp_path):
    """A function that makes a packed checkpoint with an attention."""
    from bitnet_triton.models.convert import convert_checkpoint

    def make(attention, **sizes):
        changed(attention, **sizes).save_pretrained(tmp_path / "masters")
        convert_checkpoint(tmp_path / "masters", tmp_path / "packed", to="packed")
        return tmp_path / "packed"

    return make


@pytest.fixture
def replays(monkeypatch):
    seen = []
    replay = Recording.replay

    def count(recording, *args):
        seen.append(recording)
        return replay(recording, *args)

    monkeypatch.setattr(Recording, "replay", count)
    return seen


def load(folder, **kwargs):
    return bt.BitNetForCausalLM.from_pretrained(folder, **kwargs)


def close(a, b):
    # a code beside a tie may fall to its other side; a wrong state moves logits by whole units
    return (a - b).norm() <= 3e-2 * b.norm()


def draw(B, T):
    return torch.randint(3, 96, (B, T))


def generate(model, ids=PADDED, mask=MASK, **kwargs):
    kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


@torch.no_grad()
def in_parts(model, ids, ends, **kwargs):
    """Return the logits of ids that a cache gets piece by piece, and the cache."""
    cache, logits, start = None, [], 0
    for end in ends:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("attention", [GATED, KDA, BARE], ids=["gated", "kda", "bare"])
@torch.no_grad()
def test_it_computes_what_the_gated_delta_rule_says(attention):
    """Written out token by token from the projections, with no rotation anywhere."""
    model, ids = dense(attention, num_hidden_layers=1), draw(1, 11)
    layer, seen = model.model.layers[0].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj", "attn_sub_norm"):
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
        )
    model(ids, use_cache=False)
    part, x = layer.linear, seen["q_proj"][0].double()
    q, k, v = (seen[name][1].double()[0] for name in ("q_proj", "k_proj", "v_proj"))
    if attention is not BARE:
        taps, mixed = part.convolution.weight.double(), []
        for y, w in zip((q, k, v), taps.split([H * D, HK * D, HK * D])):
            behind = torch.cat([torch.zeros(3, y.shape[1]), y])
            mixed.append(F.silu(torch.stack([
                (behind[t : t + 4] * w.T).sum(0) for t in range(len(y))
            ])))  # fmt: skip
        q, k, v = mixed
    q, k, v = (y.view(1, 11, -1, D) for y in (q, k, v))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    wide = D if attention is KDA else HK
    beta, decay, gate = (x @ part.gates.inputs.double().T).split([HK, wide, D], -1)
    if attention is KDA:
        decay = decay @ part.gates.decay_out.double().T
    decay = F.softplus(decay + part.gates.decay_bias.double())
    rate = part.gates.log_rate.double().exp()
    if attention is KDA:
        decay, rate = decay.view(1, 11, HK, D), rate[:, None]
    out, _ = recurrent_reference(
        q, k, v, log_decay=-rate * decay, beta=beta.sigmoid(), scale=D**-0.5
    )
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.norm.weight.double()
    out = out * F.silu(
        (gate @ part.gates.gate_out.double().T + part.gates.gate_bias.double()).view(1, 11, H, D)
    )
    torch.testing.assert_close(
        seen["attn_sub_norm"][0].double(), out.flatten(2), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", FEATURE_MAPS)
@torch.no_grad()
def test_the_plain_form_weighs_by_products_of_features(name):
    model, ids = (
        dense({**PLAIN, "feature_map": name, "decay": "retnet"}, num_hidden_layers=1),
        draw(1, 9),
    )
    layer, seen = model.model.layers[0].self_attn, {}
    for part in ("q_proj", "k_proj", "v_proj", "attn_sub_norm"):
        layer.get_submodule(part).register_forward_hook(
            lambda module, args, output, name=part: seen.__setitem__(name, (args[0], output))
        )
    model(ids, use_cache=False)
    cos, sin = model.model.rotary_emb(seen["q_proj"][0], torch.arange(9)[None])
    q, k, v = (seen[p][1].unflatten(-1, (-1, D)) for p in ("q_proj", "k_proj", "v_proj"))
    q, k = (
        y * cos[:, :, None] + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * sin[:, :, None]
        for y in (q, k)
    )
    q, k = (y.double() for y in layer.linear(q, k))
    weights = torch.einsum("ihf,jhf->hij", q[0], k[0].repeat_interleave(2, 1))
    rates = 1 - 2.0 ** (-5 - torch.arange(HK, dtype=torch.double)).repeat_interleave(2)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    weights = (weights * rates[:, None, None] ** distance.clamp_min(0)).tril()
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / (total + 1e-10), 0.0)
    out = torch.einsum("hij,jhd->ihd", weights, v[0].double().repeat_interleave(2, 1))
    torch.testing.assert_close(
        seen["attn_sub_norm"][0][0].double(), out.flatten(1), atol=1e-5, rtol=1e-3
    )


@every
def test_cached_is_uncached_however_a_text_is_cut(attention):
    model, ids = dense(attention), draw(2, 90)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    logits, cache = in_parts(model, ids, (1, 2, 70, 73, 74, 90))
    torch.testing.assert_close(logits, whole, atol=2e-3, rtol=1e-3)
    assert cache.get_seq_length() == 90


@every
def test_padding_leaves_the_state_alone(attention):
    model, ids, more = dense(attention), draw(2, 12), draw(2, 3)
    # 5 tokens of padding on one side of the first row
    for side, mask in (("left", torch.arange(12) >= 5), ("right", torch.arange(12) < 7)):
        mask = torch.stack([mask, torch.ones(12, dtype=torch.bool)]).long()
        other = torch.where(mask == 1, ids, draw(2, 12))
        with torch.no_grad():
            alone = model(ids[:1][:, mask[0] == 1], use_cache=True)
            places = (mask.cumsum(-1) - 1).clamp_min(0)
            out = model(other, attention_mask=mask, position_ids=places, use_cache=True)
            here = out.logits[:1, mask[0] == 1]
            torch.testing.assert_close(here, alone.logits, atol=2e-4, rtol=1e-3)
            if side == "right":
                continue  # of what comes behind such padding, positions are the model's affair
            mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
            places = places[:, -1:] + 1 + torch.arange(3)
            out = model(
                more, attention_mask=mask, position_ids=places, past_key_values=out.past_key_values
            )
            alone = model(more[:1], past_key_values=alone.past_key_values)
        torch.testing.assert_close(out.logits[:1], alone.logits, atol=2e-4, rtol=1e-3)


def test_a_state_goes_on_behind_padding_to_the_right():
    model, ids = dense(GATED), draw(2, 12)
    mask = torch.stack([torch.arange(12) < 7, torch.arange(12) < 12]).long()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        alone = model(ids[:1, :7], use_cache=True).past_key_values
    for layer, other in zip(cache.layers, alone.layers):
        torch.testing.assert_close(layer.state[:1], other.state, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.tail[:1], other.tail, atol=1e-5, rtol=1e-4)


@every
def test_packed_texts_are_read_alone(attention):
    model, ids = dense(attention), draw(1, 30)
    places = torch.cat([torch.arange(n) for n in (13, 1, 16)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split((13, 1, 16), dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-4, rtol=1e-3)


@every
def test_steps_are_recorded_and_are_one_forward(attention, folder, replays):
    model, ids = load(folder(attention)), draw(2, 40)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)
    logits, _ = in_parts(model, ids, [8, *range(9, 41)])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert close(logits[:, 8:], whole[:, 8:])
    assert len(replays) >= 28


@pytest.mark.parametrize(
    ("attention", "turns"), [(GATED, False), (PLAIN, True), (HYBRID, True)],
    ids=["gated", "elu", "hybrid"],
)  # fmt: skip
def test_a_recording_keeps_angles_only_where_something_is_turned(attention, turns, folder, replays):
    in_parts(load(folder(attention)), draw(1, 8), [4, *range(5, 9)])
    assert {len(angle) for angle in replays[-1]._angles} == {128 if turns else 1}


@every
def test_recorded_steps_are_those_that_are_launched(attention, folder, replays, monkeypatch):
    """The same states behind every step, from the same state on."""
    model, ids = load(folder(attention)), draw(2, 20)
    _, cache = in_parts(model, ids, (8,))
    former = copy.deepcopy(cache)

    def steps(cache):
        return [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 20)]

    with torch.no_grad():
        recorded = steps(cache)
        assert len(replays) >= 10
        monkeypatch.setattr(Linear, "step", Mode.step)
        model.model.decode_steps.recording = None
        replays.clear()
        launched = steps(former)
        assert not replays
    assert close(torch.cat(recorded, 1), torch.cat(launched, 1))
    for some, other in zip(cache.layers, former.layers):
        if isinstance(some, StateLayer):
            assert close(some.state, other.state)


@every
def test_generation_beside_padding_is_one_forward(attention, folder, replays):
    path = folder(attention)
    out = generate(load(path), return_dict_in_generate=True, output_logits=True)
    assert replays
    mask = torch.cat([MASK, torch.ones(2, 24, dtype=torch.long)], 1)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = load(path, fuse=False)
        whole = plain(out.sequences, attention_mask=mask, position_ids=places, use_cache=False)
    assert close(torch.stack(out.logits, 1), whole.logits[:, 6:-1])


@every
def test_beams_take_their_states_along(attention):
    model = dense(attention)
    kwargs = {"num_beams": 3, "max_new_tokens": 12}
    assert torch.equal(generate(model, **kwargs), generate(model, use_cache=False, **kwargs))


def test_the_memory_does_not_grow(folder):
    model = load(folder(GATED))
    _, short = in_parts(model, draw(1, 4), (4,))
    _, long = in_parts(model, draw(1, 120), (100, 120))

    def held(cache):
        return [[t.numel() for t in (layer.state, layer.tail)] for layer in cache.layers]

    assert held(short) == held(long)
    assert held(long) == [[HK * D * D, 3 * (H + 2 * HK) * D]] * 3
    assert all(layer.last is None or layer.last.k.shape[1] <= 64 for layer in long.layers)


@pytest.mark.parametrize(
    "attention", [GATED, KDA, HEDGEHOG, HYBRID], ids=["gated", "kda", "hedgehog", "hybrid"]
)
def test_what_lies_in_the_latest_call_is_taken_back(attention, folder):
    model, ids = load(folder(attention)), draw(1, 30)
    _, cache = in_parts(model, ids, (12, 30))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache.crop(-11)
        assert cache.get_seq_length() == 19
        again = model(ids[:, 19:], past_key_values=cache).logits
    assert close(again, whole[:, 19:])
    with pytest.raises(RuntimeError, match="takes back what lies in its latest call"):
        cache.crop(-12)


def test_an_assistant_proposes():
    model = dense(GATED)
    kwargs = {"ids": PADDED[1:], "mask": MASK[1:]}
    got = generate(model, prompt_lookup_num_tokens=3, **kwargs)
    assert torch.equal(got, generate(model, **kwargs))


def test_a_copy_of_the_cache_is_a_snapshot(folder, replays):
    model, ids = load(folder(GATED)), draw(1, 30)
    _, cache = in_parts(model, ids, (10,))
    former = copy.deepcopy(cache)
    with torch.no_grad():
        first = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
        second = [model(ids[:, t : t + 1], past_key_values=former).logits for t in range(10, 20)]
    assert replays
    assert close(torch.cat(second, 1), torch.cat(first, 1))


def test_a_saved_state_goes_on(folder, tmp_path):
    model, ids = load(folder(HYBRID)), draw(2, 20)
    _, cache = in_parts(model, ids, (15,))
    bt.save_cache(model, cache, tmp_path / "prompt.safetensors")
    again = bt.load_cache(model, tmp_path / "prompt.safetensors")
    kinds = [type(layer) for layer in again.layers]
    assert kinds == [StateLayer, GrowingLayer, StateLayer]
    with torch.no_grad():
        expected = model(ids[:, 15:], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 15:], past_key_values=again).logits, expected)


@every
def test_its_parameters_are_trained_and_saved(attention, tmp_path):
    model = changed(attention).train()
    ids = draw(2, 25)
    model(ids, labels=ids).loss.backward()
    parts = [
        layer.self_attn.linear for layer in model.model.layers if hasattr(layer.self_attn, "linear")
    ]
    assert parts
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(load(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize("attention", [GATED, KDA, HEDGEHOG], ids=["gated", "kda", "hedgehog"])
def test_padding_that_comes_token_by_token_is_none(attention, folder, replays):
    """Rows of a batch that start later than others, in steps that are recorded."""
    model, ids = load(folder(attention)), draw(2, 30)
    mask = torch.stack([torch.arange(30) >= 20, torch.arange(30) >= 2]).long()
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    logits, cache = [], None
    with torch.no_grad():
        for t in range(30):
            out = model(
                ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache,
                position_ids=places[:, t : t + 1], use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            logits.append(out.logits)
        alone = model(ids[:1, 20:], use_cache=False).logits
    assert len(replays) > 20
    assert close(torch.cat(logits, 1)[:1, 20:], alone)


def test_what_is_taken_back_behind_padding_is_not_the_padding():
    model, ids, more = dense(GATED), draw(2, 16), draw(2, 2)
    mask = torch.stack([torch.arange(16) < 16, torch.arange(16) < 10]).long()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        cache.crop(-2)
        alone = model(ids[1:, :10], use_cache=True).past_key_values
        got = model(more, past_key_values=cache).logits
        expected = model(more[1:], past_key_values=alone).logits
    torch.testing.assert_close(got[1:], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("former", [PLAIN, GATED, BARE], ids=["elu", "gated", "bare"])
@pytest.mark.parametrize("new", [{**PLAIN, "feature_map": "relu"}, HEDGEHOG, KDA, GATED])
def test_other_settings_bring_other_parameters(former, new, tmp_path):
    model, ids = dense(former), draw(2, 20)
    kept = {k: v for k, v in model.state_dict().items() if ".linear." not in k}
    bt.set_attention(model, new)
    fresh = bt.BitNetForCausalLM(
        bt.BitNetConfig(**SIZES, quantization_config=None, attention=new)
    ).eval()
    own = {k: v for k, v in model.state_dict().items() if ".linear." in k}
    fresh.load_state_dict(kept | own)  # all of them, and no others
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, fresh(ids).logits)


def test_its_parameters_may_lie_elsewhere():
    model, ids = dense(KDA), draw(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(ids).logits, expected)


def test_no_rotation_enters_the_delta_rule():
    model, ids = dense(GATED), draw(1, 20)
    places = torch.arange(20)[None] + 77
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, position_ids=places).logits)


def test_set_attention_changes_what_is_rotated(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    ids = draw(1, 9)
    with torch.no_grad():
        former = model(ids).logits
        bt.set_attention(model, "linear")
        assert not torch.allclose(model(ids).logits, former)
        bt.set_attention(model, "full")
        assert torch.equal(model(ids).logits, former)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"form": "gated"}, ValueError, "did you mean 'gated_delta'"),
        (
            {"form": "plain", "feature_map": "exp"},
            ValueError,
            "expected a 'feature_map' out of: elu",
        ),
        ({"feature_map": "relu"}, ValueError, "'feature_map': form 'gated_delta' .* has none"),
        (
            {"form": "plain", "convolution": 2},
            ValueError,
            "'convolution': form 'plain' .* has none",
        ),
        ({"convolution": 0}, ValueError, "'convolution': expected at least 1"),
    ],
)
def test_wrong_settings_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        bt.BitNetConfig(**SIZES, attention={"mode": "linear", **settings})


def test_what_keeps_no_keys_refuses_who_needs_them():
    with pytest.raises(ValueError, match="'linear' keeps a state and no keys"):
        bt.BitNetForCausalLM(
            bt.BitNetConfig(**SIZES, attention={"prefill": "full", "decode": "linear"})
        )
    model = dense(GATED)
    with pytest.raises(ValueError, match="takes no other cache than the one that the model makes"):
        model(draw(1, 5), past_key_values=DynamicCache())
