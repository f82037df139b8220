"""extend_context: rope types of every kind, on caches that keep to what they were made for."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers import BitNetConfig as HfBitNetConfig
from transformers import BitNetForCausalLM as HfBitNet
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

import bitnet_triton as bt
from bitnet_triton.kernels import apply_rotary
from bitnet_triton.models.rotary import RotaryEmbedding, text_lengths

TRAINED = 16
D = 16
METHODS = {
    "yarn": {"beta_fast": 4},
    "dynamic_yarn": {},
    "ntk": {},
    "dynamic": {},
    "linear": {},
    "longrope": {
        "short_factor": [1 + 0.05 * i for i in range(D // 2)],
        "long_factor": [1.5 + 0.5 * i for i in range(D // 2)],
    },
}
BY_LENGTH = ("dynamic_yarn", "dynamic", "longrope")


def config(**changed):
    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 80, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": TRAINED,
    }  # fmt: skip
    return {**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, **changed}


def dense_model(**changed):
    """A model without quantised activations, in which nothing small becomes large."""
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**config(quantization_config=None, **changed)))
    return model.eval()


def extended(method, model=None, factor=4):
    return bt.extend_context(model or dense_model(), factor, method, **METHODS[method])


def draw(B, T):
    return torch.randint(3, 80, (B, T))


@torch.no_grad()
def generated_logits(model, ids, new, **kwargs):
    # a text that was written may hold the padding token, which generate would hide otherwise
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_model_is_what_transformers_loads(method, tmp_path):
    model = extended(method)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    again = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.max_position_embeddings == (TRAINED if method == "dynamic" else 4 * TRAINED)
    for T in (TRAINED, 3 * TRAINED + 1):
        ids = draw(2, T)
        with torch.no_grad():
            ours = model(ids).logits
            torch.testing.assert_close(again(ids).logits, ours)
        if method == "dynamic_yarn":
            # transformers alone has no such type, and has to refuse what it would read otherwise
            assert written["model_type"] == "bitnet_triton"
            continue
        assert written["model_type"] == "bitnet"
        theirs = HfBitNet.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(ids).logits, atol=2e-5, rtol=2e-4)


def test_dynamic_yarn_is_yarn_by_the_factor_that_a_text_needs():
    dynamic, plain = extended("dynamic_yarn", factor=8), dense_model()
    plain.load_state_dict(dynamic.state_dict())
    for T, factor in ((TRAINED // 2, 1), (TRAINED, 1), (40, 40 / TRAINED), (8 * TRAINED + 30, 8)):
        ids = draw(1, T)
        bt.extend_context(plain, factor, "yarn", original_max_position_embeddings=TRAINED)
        with torch.no_grad():
            torch.testing.assert_close(dynamic(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", [None, "full"])
def test_cached_is_uncached_and_rows_are_as_alone_across_every_boundary(method, attention):
    model = extended(method, dense_model(attention=attention))
    ids, new = draw(2, 14), 12  # one row crosses the trained length, the other does not
    padding = torch.ones_like(ids)
    padding[0, :11] = 0
    sequences, logits = generated_logits(model, ids, new, attention_mask=padding)
    for row, start in ((0, 11), (1, 0)):
        alone, expected = generated_logits(model, ids[row : row + 1, start:], new)
        assert alone[0].tolist() == sequences[row, start:].tolist()
        torch.testing.assert_close(logits[row], expected[0], atol=2e-5, rtol=2e-4)
        known = {"context_length": alone.shape[1]} if method in BY_LENGTH else {}
        with torch.no_grad():
            whole = model(alone, **known).logits[:, -new - 1 : -1]
        torch.testing.assert_close(expected, whole, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("method", BY_LENGTH)
def test_a_short_row_is_not_changed_by_a_long_neighbour(method):
    model = extended(method)
    long = draw(1, 3 * TRAINED)
    short = long.clone()
    short[:, : 3 * TRAINED - 9] = 0
    mask = torch.ones(2, 3 * TRAINED, dtype=torch.int64)
    mask[0, : 3 * TRAINED - 9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        both = model(torch.cat([short, long]), attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(both[:1, -9:], model(short[:, -9:]).logits, atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(both[1:], model(long).logits, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("method", BY_LENGTH)
def test_padding_counts_for_nothing(method, told, side):
    model, ids = extended(method), draw(2, 3 * TRAINED)
    row = slice(0, 9) if side == "right" else slice(-9, None)
    mask = torch.zeros_like(ids)
    mask[0, row], mask[1] = 1, 1
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if told else {}
    with torch.no_grad():
        both = model(ids, attention_mask=mask, **given).logits
        alone = model(ids[:1, row]).logits
    torch.testing.assert_close(both[:1, row], alone, atol=2e-5, rtol=2e-4)
    if told and side == "right":  # positions that go on through the padding
        with torch.no_grad():
            both = model(ids, attention_mask=mask, position_ids=torch.arange(48)[None]).logits
        torch.testing.assert_close(both[:1, row], alone, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("method", BY_LENGTH)
def test_packed_texts_have_the_frequencies_of_their_own_lengths(method):
    model = extended(method, dense_model(attention="full"))
    texts = [draw(1, n) for n in (7, 3 * TRAINED, 1, TRAINED + 5)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        packed = model(torch.cat(texts, 1), position_ids=positions).logits
        alone = torch.cat([model(text).logits for text in texts], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("method", BY_LENGTH)
def test_beams_and_a_second_turn_keep_to_the_choice(method):
    model, ids = extended(method), draw(1, 12)
    beams = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False, pad_token_id=0)
    two = torch.cat([draw(1, 12), ids])
    among = model.generate(two, max_new_tokens=10, num_beams=3, do_sample=False, pad_token_id=0)
    assert among[1, : beams.shape[1]].tolist() == beams[0].tolist()

    cache = DynamicCache()
    length = {"context_length": 60}
    first, _ = generated_logits(model, ids, 6, past_key_values=cache, **length)
    second, logits = generated_logits(
        model, torch.cat([first, draw(1, 8)], 1), 9, past_key_values=cache
    )
    with torch.no_grad():
        whole = model(second, **length).logits[:, -10:-1]
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("move", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ],
)
@torch.no_grad()
def test_frequencies_go_where_the_rows_of_a_cache_go(move, argument, rows):
    model, ids = extended("dynamic_yarn"), draw(2, 12)
    cache = DynamicCache(config=model.config)
    lengths = torch.tensor([14, 60])  # which frequencies of their own go with
    model(ids, past_key_values=cache, context_length=lengths)
    cache = copy.deepcopy(cache)
    getattr(cache, move)(argument)
    new = draw(len(rows), 2)
    got = model(new, past_key_values=cache).logits
    whole = model(torch.cat([ids[rows], new], 1), context_length=lengths[rows]).logits
    torch.testing.assert_close(got, whole[:, -2:], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("method", BY_LENGTH)
def test_a_cache_is_refused_beyond_what_it_was_made_for(method):
    model = extended(method)
    ids = draw(1, TRAINED - 4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(draw(1, 4), past_key_values=cache)  # up to the trained length nothing changes
        with pytest.raises(ValueError, match=r"up to 16 columns.* needs 17.*context_length"):
            model(draw(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="up to 16 columns, this call needs 21"):
            model.generate(draw(1, 17), past_key_values=cache, max_new_tokens=4)
        assert cache.get_seq_length() == TRAINED
        cache.crop(-TRAINED)
        model(draw(1, 3 * TRAINED), past_key_values=cache)  # empty again: another choice


@pytest.mark.parametrize("method", BY_LENGTH)
def test_embeddings_are_a_prompt_like_ids(method):
    model, ids = extended(method), draw(1, 12)
    embeds = model.get_input_embeddings()(ids).detach()
    for new in (10, 30):
        expected, _ = generated_logits(model, ids, new)
        found = model.generate(
            inputs_embeds=embeds, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert found[0].tolist() == expected[0, 12:].tolist()


def test_positions_that_start_later_end_a_choice_earlier():
    model, places = extended("longrope"), torch.arange(TRAINED // 2, TRAINED)[None]
    with torch.no_grad():
        cache = model(draw(1, TRAINED // 2), position_ids=places, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="up to 8 columns"):
            model(draw(1, 1), position_ids=places[:, -1:] + 1, past_key_values=cache)


@pytest.mark.parametrize("method", BY_LENGTH)
def test_a_cache_in_a_file_remembers_its_choice(method, tmp_path):
    model, ids = extended(method), draw(1, 12)
    with torch.no_grad():
        cache = model(ids, use_cache=True, context_length=40).past_key_values
        bt.save_cache(model, cache, tmp_path / "cache.safetensors")
        again = bt.load_cache(model, tmp_path / "cache.safetensors")
        new = draw(1, 20)
        expected = model(new, past_key_values=cache).logits
        torch.testing.assert_close(model(new, past_key_values=again).logits, expected)
        if method != "longrope":
            with pytest.raises(ValueError, match="up to 40 columns"):
                model(draw(1, 9), past_key_values=again)
        stale = bt.load_cache(model, tmp_path / "cache.safetensors")
        bt.extend_context(model, 8, "yarn")
        with pytest.raises(ValueError, match="rotated for"):
            model(new, past_key_values=stale)


@pytest.mark.parametrize("attention", [None, "full"])
def test_a_live_cache_is_refused_after_a_change(attention):
    model = dense_model(attention=attention)
    with torch.no_grad():
        cache = model(draw(1, 8), use_cache=True).past_key_values
        extended("yarn", model)
        with pytest.raises(ValueError, match=r"rotated for .*default.*yarn"):
            model(draw(1, 1), past_key_values=cache)


def test_fused_steps_are_recorded_with_the_frequencies_of_the_cache():
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, dtype=torch.float32)
    bt.extend_context(model, 4, "dynamic_yarn", original_max_position_embeddings=32)
    ids = torch.randint(5, 500, (1, 30))
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}
    for new in (12, 70):
        options["max_new_tokens"] = new
        out = model.generate(ids, return_dict_in_generate=True, **options)
        steps = model.model.decode_steps
        assert steps.recording is not None
        cos, sin = steps.recording._angles
        with out.past_key_values._frequencies.in_use():
            expected = model.model.rotary_emb(cos, torch.arange(len(cos))[None])
        assert torch.equal(cos, expected[0][0])
        assert torch.equal(sin, expected[1][0])
        assert out.past_key_values._frequencies.lengths == (30 + new,)


def test_a_second_call_starts_from_the_trained_length():
    model = dense_model()
    for factor, method in ((2, "linear"), (8, "yarn"), (3, "dynamic_yarn"), (4, "linear")):
        bt.extend_context(model, factor, method)
        assert model.config.max_position_embeddings == factor * TRAINED
        assert model.config.rope_parameters["rope_theta"] == 100.0


def test_other_models_of_transformers_take_what_is_safe_for_them():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=50)).eval()
    ids = torch.randint(0, 50, (1, 9))
    before = llama(ids).logits
    assert bt.extend_context(llama, 2, "linear") is llama
    assert (llama(ids).logits - before).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r"`method`.*mix keys"):
        bt.extend_context(llama, 2, "dynamic_yarn")
    assert llama.config.rope_parameters["rope_type"] == "linear"
    with pytest.raises(TypeError, match="`model`"):
        bt.extend_context(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, "yarn", {}), "`factor`: expected a number of 1"),
        ((float("nan"), "yarn", {}), "`factor`"),
        (("4", "yarn", {}), "`factor`: expected a number, got str"),
        ((4, "pose", {}), "`method`: expected one of yarn"),
        ((4, "yarn", {"long_factor": [1.0]}), "`long_factor`: 'yarn' takes attention_factor"),
        ((4, "ntk", {"beta_fast": 1}), "`beta_fast`: 'ntk' takes no options"),
        ((4, "yarn", {"beta_fast": 1, "beta_slow": 2}), "`beta_fast`: expected at least"),
        ((4, "longrope", {}), "`long_factor`: 'longrope' expects 8 numbers"),
        ((4, "longrope", {"long_factor": [1.0] * 7}), "`long_factor`: expected a list of 8"),
        ((4, "longrope", {"long_factor": [0.0] * 8}), "`long_factor`: expected a number of more"),
        ((4, "yarn", {"original_max_position_embeddings": 0}), "`original_max_position_emb"),
    ],
)
def test_bad_input_changes_nothing(arguments, message):
    model = dense_model()
    before = dict(model.config.rope_parameters), model.model.rotary_emb
    factor, method, options = arguments
    with pytest.raises((TypeError, ValueError), match=message):
        bt.extend_context(model, factor, method, **options)
    assert (model.config.rope_parameters, model.model.rotary_emb) == before


def test_lengths_that_nobody_reads_or_that_do_not_fit_are_refused():
    ids = draw(2, 20)
    with pytest.raises(ValueError, match="`context_length`: expected none, rope type 'default'"):
        dense_model()(ids, context_length=40)
    model = extended("dynamic_yarn")
    for value, message in ((19, "at least the 20"), (torch.tensor([40]), r"\[B\]"), (4.0, "float")):
        with pytest.raises((TypeError, ValueError), match=f"`context_length`.*{message}"):
            model(ids, context_length=value)
    with pytest.raises(ValueError, match="`cache`: rope type 'dynamic' turns for ever longer"):
        extended("dynamic")(ids, use_cache=False, cache=object())
    plan = [{"mode": "streaming", "window": 8}, "full"]
    mixed = extended("dynamic_yarn", dense_model(attention={"prefill": plan, "decode": plan}))
    with pytest.raises(ValueError, match="`attention`: 'streaming' counts positions itself, other"):
        mixed(ids)


@pytest.mark.parametrize("method", BY_LENGTH)
@pytest.mark.parametrize("window", [TRAINED - 4, 2 * TRAINED])
def test_an_endless_stream_is_turned_for_what_its_queries_see(method, window):
    attention = {"mode": "streaming", "window": window, "sinks": 4}
    model = extended(method, dense_model(attention=attention))
    assert model.attention_plan.span == window + 4
    fixed = extended(method, dense_model())
    inv_freq, scale = fixed.model.rotary_emb.choose(torch.tensor([window + 4])).shared()
    ids, new = draw(1, 5), 4 * TRAINED  # far beyond the window, with positions that start again
    sequences, logits = generated_logits(model, ids, new)
    with torch.no_grad():
        whole = model(sequences).logits[:, -new - 1 : -1]
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=2e-4)

    class Fixed(RotaryEmbedding):
        depends_on_length = False

    rotary = Fixed(model.config)
    rotary.inv_freq, rotary.attention_scaling = inv_freq, scale
    model.use_rotary(rotary)
    with torch.no_grad():
        again = model(sequences).logits[:, -new - 1 : -1]
    torch.testing.assert_close(again, whole, atol=2e-5, rtol=2e-4)


def test_frequencies_outlive_a_cast_and_transformers_auto_class(tmp_path):
    model = extended("yarn")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.bfloat16().model.rotary_emb.inv_freq, frequencies)
    model.save_pretrained(tmp_path)
    bt.enable()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    finally:
        bt.disable()
    assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies)


def angles(positions, dtype):
    rotary = RotaryEmbedding(HfBitNetConfig(**config(hidden_size=512, head_dim=128)))
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions)
    exact = positions[..., None].double() * rotary.inv_freq.double()
    return cos, sin, torch.cat((exact, exact), -1)


def test_angles_and_the_kernel_are_right_up_to_two_million_tokens():
    positions = torch.cat([torch.arange(3), 2 ** torch.arange(3, 22), torch.tensor([2**21 - 1])])
    cos, sin, exact = angles(positions[None], torch.float32)
    # float32 angles would be off by up to 0.06 here
    assert (cos - exact.cos()).abs().max() < 1e-6
    assert (sin - exact.sin()).abs().max() < 1e-6
    x = torch.randn(1, len(positions), 2, 128)
    half = torch.cat((-x[..., 64:], x[..., :64]), -1).double()
    expected = x.double() * exact.cos()[:, :, None] + half * exact.sin()[:, :, None]
    torch.testing.assert_close(apply_rotary(x, cos, sin).double(), expected, atol=3e-6, rtol=0)


@torch.no_grad()
def test_a_mode_that_turns_keys_itself_sees_distances_alone_far_out():
    sizes = {"window": 8, "block": 4, "stride": 4, "selection": 4, "selected": 3}
    model = dense_model(attention={"mode": "native_sparse", **sizes})
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 30  # weights that depend on every angle
        layer.self_attn.k_proj.weight *= 30
    ids, positions = draw(1, 30), torch.arange(30)[None]
    near = model(ids, position_ids=positions).logits
    far = model(ids, position_ids=positions + 1_500_001).logits
    torch.testing.assert_close(far, near, atol=1e-4, rtol=1e-4)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 128).double()
    scores = []
    for shift in (0, 5, 4096, 2**17 + 1, 2**21 - 40):
        cos, sin, _ = angles(torch.tensor([[shift, shift + 33]]), torch.float64)
        turned = [
            x * cos[:, i : i + 1, None]
            + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin[:, i : i + 1, None]
            for i, x in enumerate((k, q))
        ]
        scores.append((turned[0] * turned[1]).sum().item())
    assert max(scores) - min(scores) < 2e-5


def test_lengths_of_texts_follow_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert text_lengths(positions).tolist() == [[3, 3, 3, 2, 2, 1], [6] * 6]
    assert text_lengths(positions[1:]).tolist() == [6]
