"""The mode native_sparse in whole models: its parameters, its cache, its recorded step."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload
from transformers.cache_utils import Cache, DynamicCache

import bitnet_triton as bt
from bitnet_triton.attention.modes.native_sparse import NativeSparse
from bitnet_triton.cache import CompressedLayer
from bitnet_triton.kernels import compress_blocks, flash_attention
from bitnet_triton.kernels.native_sparse import launchers
from bitnet_triton.kernels.native_sparse.reference import native_sparse_reference
from bitnet_triton.models.fused.layer import FusedDecoderLayer
from bitnet_triton.models.fused.recording import Recording

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
SPARSE = {
    "mode": "native_sparse", "block": 4, "stride": 2, "selection": 4, "selected": 3, "window": 5,
}  # fmt: skip
OWN = {**SPARSE, "shared_kv": False, "compression": "mlp"}
# its cosines and sines are multiplied with a number
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5,
        "original_max_position_embeddings": 32,
    }
}  # fmt: skip
# by its length: a text of more than 16 tokens is turned by the long factors, and scaled
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], "attention_factor": 1.2,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
JUMPS = {"shared": SPARSE, "own keys": OWN, "decode": {"prefill": "full", "decode": SPARSE}}
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30, 7], [1, 5, 23, 71, 8, 40, 6]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])

pytestmark = pytest.mark.usefixtures("default_backend")


def changed(attention, **sizes):
    """Return a model whose parameters, those of the mode too, are not where they start."""
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES | sizes, attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


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
    # a code beside a tie may fall to its other side; a wrong key moves logits by whole units
    return (a - b).norm() <= 3e-2 * b.norm()


def generate(model, ids=PADDED, mask=MASK, **kwargs):
    kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


def look_into(model, names):
    """Return a dictionary that a call of the first layer fills with inputs and outputs."""
    seen, attention = {}, model.model.layers[0].self_attn
    for name in names:
        attention.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
        )
    return seen


def positions_with_jumps(B, T):
    """Return positions that jump between any two tokens, once backwards."""
    steps = torch.randint(1, 9, (B, T))
    steps[:, T // 2] = -3
    return 5 + steps.cumsum(-1)


def rotate(x, positions, model):
    cos, sin = model.model.rotary_emb(x, positions[None])
    half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1)
    return x * cos[:, :, None] + half * sin[:, :, None]


@pytest.mark.parametrize(
    ("attention", "sizes", "at"),
    [
        (SPARSE, YARN, torch.arange(23)),
        (OWN, {}, torch.arange(23)),
        (SPARSE, {}, positions_with_jumps(1, 23)[0]),
        (OWN, YARN, positions_with_jumps(1, 23)[0]),
        (SPARSE, LONGROPE, torch.arange(23)),
        (OWN, LONGROPE, torch.arange(23)),
    ],
    ids=[
        "shared, yarn",
        "own keys",
        "shared, jumps",
        "own keys, yarn, jumps",
        "shared, longrope",
        "own keys, longrope",
    ],
)
def test_it_computes_what_the_paper_says(attention, sizes, at):
    """By the formula: keys compressed before they are rotated, to the first token of a block."""
    model, ids = changed(attention, **sizes).eval(), torch.randint(3, 96, (1, 23))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "attn_sub_norm"]
    own = [f"native_sparse.{b}_{p}_proj" for b in ("compressed", "window") for p in "kv"]
    seen = look_into(model, names + (own if attention is OWN else []))
    with torch.no_grad():
        model(ids, torch.ones_like(ids), at[None], use_cache=False)  # with a mask: one text
        part, (hidden, _) = model.model.layers[0].self_attn.native_sparse, seen["q_proj"]
        heads = {k: out.unflatten(-1, (-1, 16)) for k, (_, out) in seen.items() if "o_p" not in k}
        raw = [heads["k_proj"], heads["v_proj"]]
        q, k = (rotate(heads[name], at, model) for name in ("q_proj", "k_proj"))
        kw, vw = k, heads["v_proj"]
        if attention is OWN:
            raw, kw = [heads[n] for n in own[:2]], rotate(heads[own[2]], at, model)
            vw = heads[own[3]]
        made = []
        for compressor, x in zip((part.keys, part.values), raw):
            kinds = {"weights": compressor.weights, "positions": compressor.positions}
            kinds["mlp"] = tuple(compressor.mlp) or None
            made.append(compress_blocks(x, block=4, stride=2, **kinds))
        kc = rotate(made[0], at[::2][: made[0].shape[1]], model)
        gates = torch.sigmoid(hidden @ part.gates.weight.T + part.gates.bias).unflatten(-1, (4, 3))
        expected, _ = native_sparse_reference(
            q, k, heads["v_proj"], kc, made[1], gates, blocks=NativeSparse(**dict(list(
            SPARSE.items())[1:])).blocks, k_window=kw, v_window=vw, scale=0.25,
        )  # fmt: skip
    torch.testing.assert_close(seen["attn_sub_norm"][0], expected.flatten(2), atol=1e-5, rtol=1e-4)


def test_fused_layers_compute_the_same(folder):
    path = folder(SPARSE)
    with torch.no_grad():
        plain = load(path, fuse=False)(PADDED, attention_mask=MASK).logits
        model = load(path)
        assert any(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)
        got = model(PADDED, attention_mask=MASK).logits
    assert close(got[1], plain[1])
    assert close(got[0, 3:], plain[0, 3:])


@pytest.mark.parametrize(
    ("compression", "sizes"), [("weights", {}), ("mean", {}), ("weights", YARN)]
)
def test_steps_are_recorded_and_are_one_forward(compression, sizes, folder, replays):
    model = load(folder({**SPARSE, "compression": compression}, **sizes))
    with torch.no_grad():
        ids = torch.randint(3, 96, (2, 40))
        cache = model(ids[:, :8], use_cache=True).past_key_values
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 40)]
        whole = model(ids, use_cache=False).logits[:, 8:]
    assert close(torch.cat(logits, 1), whole)
    assert len(replays) >= 28  # but for steps in which the memory has grown


def test_recorded_steps_read_parameters_where_they_lie(folder, replays):
    """Written to in place, as an optimizer does, after a step was recorded on the same memory."""
    model, ids = load(folder(SPARSE)), torch.randint(3, 96, (1, 40))
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values  # no block is whole
        for t in range(3, 40):
            model(ids[:, t : t + 1], past_key_values=cache)
        count = len(replays)
        for layer in model.model.layers:
            parts = layer.self_attn.native_sparse
            for parameter in (*parts.keys.parameters(), *parts.values.parameters()):
                parameter.add_(0.5 * torch.randn_like(parameter))
        cache.crop(-37)
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(3, 40)]
        whole = model(ids, use_cache=False).logits[:, 3:]
    assert len(replays) - count >= 32
    assert all(recording is replays[-1] for recording in replays[count:])
    assert close(torch.cat(logits, 1), whole)


def test_generation_with_padding_and_beams_is_that_of_single_launches(folder, replays):
    path = folder(SPARSE)
    plain, model = load(path, fuse=False), load(path)
    assert torch.equal(generate(model), generate(plain))
    assert len(replays) >= 18
    assert torch.equal(generate(model, num_beams=3), generate(plain, num_beams=3))
    alone = generate(model, PADDED[:1, 3:], MASK[:1, 3:])
    assert torch.equal(generate(model)[:1, 3:], alone)


@pytest.mark.parametrize("attention", [SPARSE, OWN], ids=["shared", "own keys"])
def test_a_cache_is_cropped_and_an_assistant_helps(attention, folder):
    model = load(folder(attention))
    # transformers takes pad tokens that an assistant reads for padding
    kwargs = {"ids": PADDED[1:], "mask": MASK[1:], "suppress_tokens": [0]}
    twin = copy.deepcopy(model)
    assert torch.equal(generate(model, assistant_model=twin, **kwargs), generate(model, **kwargs))
    ids = torch.randint(3, 96, (1, 21))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert all(type(layer) is CompressedLayer for layer in cache.layers)
        cache.crop(-9)
        again = model(ids[:, 12:], past_key_values=cache).logits
        assert close(again, model(ids).logits[:, 12:])


@pytest.mark.parametrize("attention", [SPARSE, OWN], ids=["shared", "own keys"])
def test_its_parameters_are_saved_and_loaded(attention, folder, tmp_path):
    model = load(folder(attention))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    former, found = (
        {k: v for k, v in m.state_dict().items() if "native_sparse" in k} for m in (model, again)
    )
    assert former.keys() == found.keys()
    assert all(torch.equal(former[name], found[name]) for name in former)
    own = [name for name in former if "window_k_proj" in name]
    assert bool(own) == (attention is OWN)
    # projections are ternary with those of the model; gates and compressors are not
    assert all(former[name].dtype == torch.uint8 for name in own if name.endswith(".weight"))
    assert former["model.layers.0.self_attn.native_sparse.gates.weight"].is_floating_point()
    with torch.no_grad():
        assert torch.equal(again(PADDED).logits, model(PADDED).logits)


@pytest.mark.parametrize("compression", ["mean", "weights", "linear", "mlp"])
def test_its_parameters_are_trained(compression):
    attention = {**SPARSE, "compression": compression, "shared_kv": compression != "mlp"}
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention=attention)).train()
    ids = torch.randint(3, 96, (2, 25))
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for name, parameter in layer.self_attn.native_sparse.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("starts", [(0, 0, 0), (3, 40, 7)], ids=["from 0", "from anywhere"])
def test_packed_texts_are_read_alone(starts):
    model = changed(SPARSE, quantization_config=None).eval()
    ids = torch.randint(3, 96, (1, 30))
    places = torch.cat([start + torch.arange(n) for start, n in zip(starts, (13, 1, 16))])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split((13, 1, 16), dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


def test_compression_starts_as_the_mean():
    x = torch.randn(1, 11, 2, 16)
    for kind in ("weights", "linear", "mlp"):
        mode = NativeSparse(block=4, stride=2, selection=4, selected=3, compression=kind)
        config = bt.BitNetConfig(**SIZES)
        got = mode.module(config).keys(x, block=4, stride=2)
        expected = compress_blocks(x, block=4, stride=2)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_dense_model_starts_as_half_of_two_dense_branches(checkpoint):
    """All blocks selected, a wide window: but for a share of the compressed ones, what it was."""
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    wide = {"mode": "native_sparse", "window": 64, "block": 4, "stride": 4, "selection": 8}
    with torch.no_grad():
        dense = model(PADDED[1:]).logits
        assert bt.set_attention(model, wide) is model
        part = model.model.layers[0].self_attn.native_sparse
        gates = part.gates(torch.randn(1, 1, model.config.hidden_size))[0, 0, 0]
        torch.testing.assert_close(gates, torch.tensor([-2.0, 0.0, 0.0]).sigmoid())
        start = model(PADDED[1:]).logits
        for layer in model.model.layers:
            layer.self_attn.native_sparse.gates.bias.view(-1, 3)[:, 0] = -30.0
        closed = model(PADDED[1:]).logits
    assert close(closed, dense)
    assert not torch.equal(start, dense)
    bt.set_attention(model, "full")
    assert not hasattr(model.model.layers[0].self_attn, "native_sparse")


def test_a_token_far_behind_the_window_is_found():
    """With all gates but that of the chosen blocks shut, a key in an old block still counts."""
    mode = {**SPARSE, "window": 2, "selected": 10, "selection": 4}
    model = changed(mode, num_hidden_layers=1, quantization_config=None).eval()
    part = model.model.layers[0].self_attn.native_sparse
    ids = torch.randint(3, 96, (1, 38))
    other = ids.clone()
    other[0, 9] = (ids[0, 9] - 2) % 90 + 3
    with torch.no_grad():
        for parameter, start in ((part.gates.weight, 0.0), (part.gates.bias, -30.0)):
            parameter.fill_(start)
        part.gates.bias.view(-1, 3)[:, 1] = 0.0
        assert not torch.allclose(model(ids).logits[:, -1], model(other).logits[:, -1])
        part.gates.bias.fill_(-30.0).view(-1, 3)[:, 2] = 0.0
        assert torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"stride": 3}, ValueError, "'native_sparse': `block`: expected a multiple of `stride`"),
        ({"selected": 2}, ValueError, "`selected`: expected at least `initial` . `local`"),
        ({"compression": "men"}, ValueError, "did you mean 'mean'"),
        ({"shared_kv": 1}, TypeError, "'shared_kv': expected true or false"),
        ({"window": 0}, ValueError, "'window': expected at least 1"),
    ],
)
def test_wrong_settings_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        bt.BitNetConfig(**SIZES, attention={**SPARSE, **settings})


@pytest.mark.parametrize(
    ("attention", "match"),
    [
        ({"prefill": SPARSE, "decode": {**SPARSE, "stride": 4}}, "need the same 'stride'"),
        ({"prefill": "full", "decode": OWN}, "expected no 'full' in the other phase"),
        ({"prefill": {"mode": "streaming", "window": 4}, "decode": SPARSE}, "no memory serves"),
        ({"prefill": SPARSE, "decode": {"mode": "quest", "page": 4, "budget": 8}},
         "no memory serves"),
    ],
)  # fmt: skip
def test_what_no_memory_serves_is_refused(attention, match):
    with pytest.raises(ValueError, match=match):
        bt.BitNetConfig(**SIZES, attention=attention)


def test_what_it_cannot_do_is_refused_by_name(folder):
    model = load(folder(OWN), fuse=False)
    with pytest.raises(
        ValueError, match=r"'native_sparse' with keys of its own .* needs the cache"
    ):
        generate(model, cache_implementation="static")
    with pytest.raises(ValueError, match="'native_sparse' takes padding on one side of a row"):
        model(PADDED, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool), use_cache=False)
    with pytest.raises(bt.CheckpointError, match="native_sparse"):
        load(bt.RECALL_MODEL, attention="native_sparse")


@pytest.mark.parametrize("attention", [SPARSE, OWN], ids=["shared", "own keys"])
def test_its_parameters_are_offloaded(attention, folder):
    model, ids = load(folder(attention)), torch.randint(3, 96, (1, 17))
    with torch.no_grad():
        logits = model(ids).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        cache = model(ids[:, :9], use_cache=True).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 17)]
    assert close(torch.cat(steps, 1), logits[:, 9:])


def test_steps_of_another_mode_leave_no_block_out(folder):
    """What full attention decodes in one turn, the prompt of the next reads compressed."""
    path = folder({"prefill": SPARSE, "decode": "full"})
    ids, found = torch.randint(3, 96, (1, 60)), []
    with torch.no_grad():
        for model in (load(path), load(path, fuse=False)):
            cache = None
            for start in range(0, 60, 20):
                for t in (start, *range(start + 10, start + 20)):
                    part = ids[:, t : t + 10] if t == start else ids[:, t : t + 1]
                    out = model(part, past_key_values=cache, use_cache=True, prompt_len=start + 10)
                    cache = out.past_key_values
            found.append(model(ids[:, :9], past_key_values=cache, prompt_len=69).logits)
    assert close(*found)


def test_a_cache_with_blocks_of_other_sizes_is_refused(folder):
    model = load(folder(SPARSE))
    with torch.no_grad():
        cache = model(PADDED[1:], use_cache=True).past_key_values
        bt.set_attention(model, {**SPARSE, "stride": 4})
        with pytest.raises(ValueError, match="holds blocks of 4 tokens, one every 2"):
            model(PADDED[1:, :1], past_key_values=cache)


@pytest.mark.parametrize("attention", [SPARSE, OWN], ids=["shared", "own keys"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_by_length_are_those_of_the_whole_text(kind, attention, folder, replays):
    """Chosen before the first token: blocks that are whole within the trained length too."""
    sizes = LONGROPE if kind == "longrope" else {**DYNAMIC, "max_position_embeddings": 16}
    model, ids = load(folder(attention, **sizes)), torch.randint(3, 96, (2, 40))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :8], use_cache=True, context_length=40).past_key_values
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 40)]
        assert close(torch.cat(logits, 1), whole[:, 8:])
        short = model(ids[:, :12], use_cache=True)
        within = model(ids[:, :12], use_cache=False, context_length=12).logits
    assert bool(replays) == (attention is SPARSE)
    assert close(short.logits, within)
    assert not close(whole[:, :12], within)
    with pytest.raises(ValueError, match="`past_key_values`: its keys are rotated for texts of"):
        model(ids[:, 12:], past_key_values=short.past_key_values)


def test_rows_that_turn_by_different_angles_are_refused():
    model, ids = changed(SPARSE, **LONGROPE).eval(), torch.randint(3, 96, (2, 23))
    mask = torch.stack([torch.arange(23) >= 11, torch.arange(23) >= 0]).long()
    with torch.no_grad(), pytest.raises(ValueError, match="all within the trained length or all"):
        model(ids, attention_mask=mask)


def test_steps_that_are_not_recorded_say_why(folder, replays, caplog):
    model = load(folder(OWN))
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        generate(model)
    assert not replays
    (line,) = [r.message for r in caplog.records if "decode step" in r.message]
    assert line.endswith("of layer 0: each branch projects keys and values of its own")


def test_gradients_go_through_a_cache():
    model = changed(SPARSE, quantization_config=None).train()
    ids, grads = torch.randint(3, 96, (1, 18)), []
    for chunks in ((18,), (7, 11)):
        cache, start, loss = None, 0, 0.0
        model.zero_grad()
        for n in chunks:
            out = model(ids[:, start : start + n], past_key_values=cache, use_cache=True)
            loss, cache, start = loss + out.logits.square().sum(), out.past_key_values, start + n
        loss.backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_everything_selected_is_dense_attention_in_the_op_of_the_mode():
    """Against the machine's flash attention: one branch open, all blocks chosen."""
    mode = {**SPARSE, "selected": 16, "selection": 8, "window": 64}
    model = changed(mode, num_hidden_layers=1, quantization_config=None).eval()
    seen = look_into(model, ["q_proj", "k_proj", "v_proj", "attn_sub_norm"])
    part, ids = model.model.layers[0].self_attn.native_sparse, torch.randint(3, 96, (1, 40))
    with torch.no_grad():
        part.gates.weight.zero_()
        part.gates.bias.fill_(-40.0).view(-1, 3)[:, 1] = 40.0
        model(ids, use_cache=False)
        heads = [seen[n][1].unflatten(-1, (-1, 16)) for n in ("q_proj", "k_proj", "v_proj")]
        q, k = (rotate(t, torch.arange(40), model) for t in heads[:2])
        expected = flash_attention(q, k, heads[2]).flatten(2)
    torch.testing.assert_close(seen["attn_sub_norm"][0], expected, atol=1e-5, rtol=1e-4)


def lead_of_choices(call):
    """Return by how much a block was chosen rather than another, at the least, in ``call``."""
    leads, choose = [], launchers.select_reference

    def look(scores, *, blocks, before):
        chosen = choose(scores, blocks=blocks, before=before)
        own = (torch.arange(scores.shape[2]) + before)[:, None] // blocks.selection
        j = torch.arange(scores.shape[-1])
        taken = (chosen.transpose(1, 2)[..., None] == j).any(-2)
        free = (j >= blocks.initial) & (j <= own - blocks.local)  # to be chosen or not
        least = scores.masked_fill(~(taken & free), torch.inf).amin(-1)
        left = scores.masked_fill(taken | ~free, -torch.inf).amax(-1)
        leads.append((least - left).min().item())
        return chosen

    with pytest.MonkeyPatch.context() as patch, bt.use_backend("reference"):
        patch.setattr(launchers, "select_reference", look)
        call()
    return min(leads)


@pytest.mark.parametrize("attention", JUMPS.values(), ids=JUMPS)
def test_blocks_across_a_jump_of_positions_are_turned_back_by_their_own(attention, draw_clear):
    """A later call begins elsewhere than the former ended, also within it, row by row."""
    model = changed(attention, quantization_config=None).eval()
    at, told = positions_with_jumps(2, 30), {"prompt_len": 17} if "decode" in attention else {}
    with torch.no_grad():
        ids = draw_clear(
            lambda: torch.randint(3, 96, (2, 30)),
            lambda ids: (
                30
                * lead_of_choices(
                    lambda: model(ids, torch.ones_like(ids), at, use_cache=False, **told)
                )
            ),
        )
        whole = model(ids, torch.ones_like(ids), at, use_cache=False, **told).logits
        cache, parts = None, []
        for some in torch.arange(30).split([10, 7, 1, 1, 1, 10]):
            out = model(ids[:, some], position_ids=at[:, some], past_key_values=cache, **told)
            cache, parts = out.past_key_values, [*parts, out.logits]
    # 1e-4 at the most in most draws, 2e-4 in one of 30
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=4e-4, rtol=4e-4)


def test_recorded_steps_turn_blocks_across_a_jump_back_by_their_own_positions(folder, replays):
    """Also by ones behind all that a recording had angles for."""
    model, ids, at = load(folder(SPARSE)), torch.randint(3, 96, (2, 60)), torch.arange(60)
    at = torch.stack([at * 2 + 1, at + (at > 20) * 40])
    at[:, 40:46] += 900
    with torch.no_grad():
        whole = model(ids, torch.ones_like(ids), at, use_cache=False).logits
        cache, parts = None, []
        for some in torch.arange(60).split([9, *[1] * 31, 6, *[1] * 14]):
            out = model(ids[:, some], position_ids=at[:, some], past_key_values=cache)
            cache, parts = out.past_key_values, [*parts, out.logits]
    assert close(torch.cat(parts, 1), whole)
    assert len(replays) >= 40


def test_only_its_own_cache_goes_along_with_positions_of_ones_own(folder):
    """Another one tells of keys and not of the positions by which they are turned back."""
    model, ids = load(folder(SPARSE)), torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        cache = DynamicCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(6, dim=1)]
        assert close(torch.cat(parts, 1), model(ids).logits)
        for at in (torch.arange(30, 34)[None], torch.tensor([[12, 13, 14, 17]])):
            with pytest.raises(ValueError, match=r"`position_ids`: .*native_sparse' takes others"):
                model(ids[:, :4], position_ids=at, past_key_values=cache)
        model = bt.set_attention(model, "full")
        cache = Cache(layers=[CompressedLayer(4, 2) for _ in range(2)])
        model(ids, past_key_values=cache)
        bt.set_attention(model, SPARSE)
        with pytest.raises(ValueError, match="of tokens 0 to 12 no positions are known"):
            model(ids[:, :1], past_key_values=cache)
