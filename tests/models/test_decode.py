"""Recorded decode steps of a fused model: the logits and the caches of the steps one by one."""

import copy
import gc
import threading
import weakref

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.models.fused import recording
from bitnet_triton.models.fused.recording import Recording
from bitnet_triton.models.fused.step import DecodeSteps
from bitnet_triton.nn import PackedBitLinear

IDS = [[1, 5, 23, 71, 8, 40]]

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
def model(checkpoint):
    return bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), fuse=False)


def generate(model, ids, n=12, **kwargs):
    return model.generate(
        torch.as_tensor(ids), max_new_tokens=n, eos_token_id=None, pad_token_id=0,
        do_sample=False, **kwargs,
    )  # fmt: skip


def steps(model, ids, n, **kwargs):
    """Return the logits of ``n`` steps after a prompt, and the cache."""
    with torch.inference_mode():
        output = model(ids, use_cache=True, **kwargs)
        cache, logits = output.past_key_values, []
        for i in range(n):
            token = torch.full((ids.shape[0], 1), 3 + i % 90)
            logits.append(model(token, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def close(a, b):
    return (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize("B", [1, 3])
def test_logits_and_cache_are_those_of_single_launches(B, model, token_ids, replays):
    ids = token_ids(B, 5)
    expected, kept = steps(model, ids, 6)
    logits, cache = steps(bt.fuse(model), ids, 6)
    assert len(replays) == 5  # the first step finds the cache where the prompt has left it
    assert len(set(replays)) == 1
    assert close(logits, expected)
    assert cache.get_seq_length() == kept.get_seq_length() == 11
    for layer, other in zip(cache.layers, kept.layers):
        assert close(layer.keys, other.keys)
        assert close(layer.values, other.values)


def test_the_same_tokens_are_written(model, replays):
    expected = generate(model, IDS)
    assert torch.equal(generate(bt.fuse(model), IDS), expected)
    assert replays


def test_the_embedded_model_writes_the_same_text(replays):
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, fuse=False)
    ids = torch.arange(3, 19).view(1, 16)
    expected = generate(model, ids, 40)
    assert torch.equal(generate(bt.fuse(model), ids, 40), expected)
    assert len(replays) >= 35


def test_a_cache_that_outgrows_its_memory_is_recorded_anew(model, token_ids, replays):
    ids = token_ids(1, 7)
    expected, _ = steps(model, ids, 300)
    logits, cache = steps(bt.fuse(model), ids, 300)
    assert close(logits, expected)
    assert 2 <= len(set(replays)) <= 6  # the tables of angles grow as well
    assert cache.get_seq_length() == 307


def test_padding_on_the_left_changes_no_row(model, token_ids, replays):
    padded = torch.tensor([[0, 0, 0, 1, 9, 30], *IDS])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    expected = generate(model, padded, attention_mask=mask)
    assert torch.equal(generate(bt.fuse(model), padded, attention_mask=mask), expected)
    assert replays


def test_other_masks_take_the_layers_own_way(model, token_ids, replays):
    ids = token_ids(1, 6)
    hole = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])
    bt.fuse(model)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        model(torch.tensor([[4]]), past_key_values=cache)
        model(torch.tensor([[4]]), past_key_values=cache, attention_mask=hole)
        assert not replays
        model(torch.tensor([[4]]), past_key_values=cache)
    assert replays


def test_beams_static_caches_and_several_tokens_take_the_layers_own_way(model, replays):
    expected = [
        generate(model, IDS, num_beams=3),
        generate(model, IDS, cache_implementation="static"),
    ]
    bt.fuse(model)
    assert torch.equal(generate(model, IDS, num_beams=3), expected[0])
    assert torch.equal(generate(model, IDS, cache_implementation="static"), expected[1])
    with torch.inference_mode():
        cache = model(torch.tensor(IDS), use_cache=True).past_key_values
        for _ in range(3):
            model(torch.tensor([[4, 5]]), past_key_values=cache)
    assert not replays


def test_assisted_generation_gives_the_same_tokens(model, replays):
    assistant = copy.deepcopy(model)
    expected = generate(model, IDS)
    bt.fuse(model)
    bt.fuse(assistant)
    assert torch.equal(generate(model, IDS, assistant_model=assistant), expected)


def test_a_crop_is_followed(model, token_ids):
    ids = token_ids(1, 6)
    bt.fuse(model)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        token = torch.tensor([[4]])
        for _ in range(4):
            model(token, past_key_values=cache)
        cache.crop(-2)
        after = model(token, past_key_values=cache).logits
        expected = model(torch.cat([ids, *[token] * 3], 1)).logits[:, -1:]
    assert close(after, expected)


def test_two_caches_in_turns_do_not_mix(model, token_ids):
    prompts = [token_ids(1, 6), token_ids(1, 9)]
    expected = [steps(model, ids, 4)[0] for ids in prompts]
    bt.fuse(model)
    with torch.inference_mode():
        caches = [model(ids, use_cache=True).past_key_values for ids in prompts]
        logits = [[], []]
        for i in range(4):
            for which in (0, 1):
                token = torch.tensor([[3 + i]])
                out = model(token, past_key_values=caches[which]).logits
                logits[which].append(out)
    for found, wanted in zip(logits, expected):
        assert close(torch.cat(found, 1), wanted)


def test_a_result_outlives_the_next_step(model, token_ids):
    bt.fuse(model)
    with torch.inference_mode():
        cache = model(token_ids(1, 6), use_cache=True).past_key_values
        inner = model.model
        results = [
            inner(torch.tensor([[i]]), past_key_values=cache).last_hidden_state for i in range(4, 8)
        ]
    kept = [r.clone() for r in results]
    assert not torch.equal(results[2], results[3])
    assert all(map(torch.equal, results, kept))


def test_new_weights_are_used(model, token_ids, replays):
    ids = token_ids(1, 6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name:
                parameter.mul_(0.5)
    expected, _ = steps(other, ids, 4)
    bt.fuse(model)
    steps(model, ids, 4)
    model.load_state_dict(other.state_dict())
    assert close(steps(model, ids, 4)[0], expected)
    model.to(torch.float16)
    steps(model, ids, 4)
    model.to(torch.float32)
    assert close(steps(model, ids, 4)[0], expected)
    assert replays


def test_what_is_asked_for_besides_is_there(checkpoint, replays):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attn_implementation="eager")
    bt.fuse(model)
    with torch.inference_mode():
        cache = model(torch.tensor(IDS), use_cache=True).past_key_values
        token = torch.tensor([[4]])
        for _ in range(3):
            out = model(token, past_key_values=cache, output_hidden_states=True)
            assert len(out.hidden_states) == 3
            out = model(token, past_key_values=cache, output_attentions=True)
            assert len(out.attentions) == 2
        assert isinstance(model(token, past_key_values=cache, return_dict=False), tuple)
    assert not replays


def test_gradients_and_hooks_take_the_layers_own_way(model, token_ids, replays):
    bt.fuse(model)
    token = torch.tensor([[4]])
    with torch.no_grad():
        cache = model(token_ids(1, 6), use_cache=True).past_key_values
        model(token, past_key_values=cache)
    model(token, past_key_values=cache).logits.sum().backward()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        model(token, past_key_values=cache)
        model(token, past_key_values=cache)
        assert len(seen) == 2
        handle.remove()
        assert not replays
        for _ in range(2):
            model(token, past_key_values=cache)
    assert replays


def test_a_forced_backend_is_obeyed(model, token_ids, replays):
    bt.fuse(model)
    token = torch.tensor([[4]])
    with torch.no_grad(), bt.use_backend("reference"):
        cache = model(token_ids(1, 6), use_cache=True).past_key_values
        for _ in range(3):
            model(token, past_key_values=cache)
    assert not replays


def test_nothing_is_recorded_where_triton_cannot_run(model, token_ids, replays, monkeypatch):
    bt.fuse(model)
    monkeypatch.setattr(recording, "backend_objection", lambda *_: "there is no compiler")
    steps(model, token_ids(1, 6), 4)
    assert not replays


def test_threads_may_decode_with_one_model(model, token_ids):
    prompts = [token_ids(1, 5 + i) for i in range(3)]
    expected = [steps(model, ids, 8)[0] for ids in prompts]
    bt.fuse(model)
    results = {}

    def work(i):
        results[i] = steps(model, prompts[i], 8)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert close(results[i], expected[i])


def test_a_copy_records_for_itself(model, token_ids, replays):
    ids = token_ids(1, 6)
    bt.fuse(model)
    expected, _ = steps(model, ids, 4)
    twin = copy.deepcopy(model)
    assert isinstance(twin.model.decode_steps, DecodeSteps)
    assert twin.model.decode_steps is not model.model.decode_steps
    for parameter in model.parameters():
        parameter.data.zero_()
    assert close(steps(twin, ids, 4)[0], expected)
    assert len(set(replays)) == 2


def test_unfusing_gives_the_model_its_class_back(model):
    kind = type(model.model)
    bt.unfuse(bt.fuse(model))
    assert type(model.model) is kind
    assert not hasattr(model.model, "decode_steps")


def negate(module, args, output):
    return -output


WATCHED = {
    "a hook on a layer": lambda model: model.model.layers[0].register_forward_hook(negate),
    "a hook in front of a layer": lambda model: model.model.layers[1].register_forward_pre_hook(
        lambda layer, args: (-args[0], *args[1:])
    ),
    "a hook on the angles": lambda model: model.model.rotary_emb.register_forward_hook(
        lambda module, args, output: (output[0], -output[1])
    ),
    "a forward of a layer": lambda model: setattr(
        model.model.layers[0], "forward", lambda x, **kwargs: -x
    ),
    "a forward of a part": lambda model: setattr(
        model.model.layers[0].mlp, "forward", lambda x: 0 * x
    ),
    "angles": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
}


@pytest.mark.parametrize("change", WATCHED)
@pytest.mark.parametrize("when", ["before", "between"])
def test_what_is_changed_runs_in_every_step(change, when, model, token_ids):
    ids, models = token_ids(1, 5), {"plain": copy.deepcopy(model), "fused": bt.fuse(model)}
    logits = {}
    for name, one in models.items():
        with torch.inference_mode():
            if when == "before":
                WATCHED[change](one)
            output = one(ids, use_cache=True)
            for i in range(8):
                if i == 4 and when == "between":
                    WATCHED[change](one)
                token = torch.full((1, 1), 3 + i)
                output = one(token, past_key_values=output.past_key_values)
            logits[name] = output.logits
    assert close(logits["fused"], logits["plain"])


def swap_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]  # without another layer_idx


def other_memory(name):
    def change(model):
        for layer in model.model.layers:
            linear = layer.self_attn.v_proj
            buffer = getattr(linear, name)
            buffer.data = buffer.flip(0).clone() if buffer.ndim > 1 else 2 * buffer

    return change


class Negated(PackedBitLinear):
    def forward(self, input):
        return -super().forward(input)


def share_an_mlp(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def double_scales(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight_scale.mul_(2)
        layer.mlp.down_proj.weight_scale.mul_(2)


IN_BETWEEN = {
    "scales": double_scales,
    "a module of another layer": share_an_mlp,
    "class of a linear": lambda model: setattr(
        model.model.layers[1].self_attn.o_proj, "__class__", Negated
    ),
    "forward of a linear": lambda model: setattr(
        model.model.layers[1].self_attn.o_proj, "forward", lambda x: -x
    ),
}


@pytest.mark.parametrize("change", IN_BETWEEN)
def test_what_a_step_sees_counts_from_the_next_one_on(change, model, token_ids, replays):
    ids, models = token_ids(1, 5), {"plain": copy.deepcopy(model), "fused": bt.fuse(model)}
    logits = {}
    for name, one in models.items():
        with torch.inference_mode():
            cache, logits[name] = one(ids, use_cache=True).past_key_values, []
            for i in range(8):
                if i == 4:
                    assert replays or one is not model
                    IN_BETWEEN[change](one)
                token = torch.full((1, 1), 3 + i)
                logits[name].append(one(token, past_key_values=cache).logits)
    assert close(torch.cat(logits["fused"]), torch.cat(logits["plain"]))


ATTRIBUTES = {
    "epsilon of a norm": lambda model: setattr(
        model.model.layers[1].input_layernorm, "variance_epsilon", 0.5
    ),
    "epsilon of the last norm": lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
    "scale of attention": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0),
    "scale of the angles": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0),
    "order of the layers": swap_layers,
    "index of a layer": lambda model: [
        setattr(layer.self_attn, "layer_idx", 1 - i) for i, layer in enumerate(model.model.layers)
    ],
    "other memory of codes": other_memory("weight"),
    "other memory of scales": other_memory("weight_scale"),
}


@pytest.mark.parametrize("change", ATTRIBUTES)
@pytest.mark.parametrize("when", ["before any call", "between two texts", "after the prompt"])
def test_what_only_a_thorough_look_sees_counts_from_the_next_prompt_on(
    change, when, model, token_ids, replays
):
    ids, models = token_ids(1, 5), {"plain": copy.deepcopy(model), "fused": bt.fuse(model)}
    logits = {}
    for name, one in models.items():
        if when == "before any call":
            ATTRIBUTES[change](one)
        if when == "between two texts":
            steps(one, ids, 4)
            ATTRIBUTES[change](one)
        with torch.inference_mode():
            output = one(ids, use_cache=True)
            if when == "after the prompt":
                ATTRIBUTES[change](one)
                output = one(ids, use_cache=True)
            for i in range(6):
                token = torch.full((1, 1), 3 + i)
                output = one(token, past_key_values=output.past_key_values)
        logits[name] = output.logits
    assert replays
    assert close(logits["fused"], logits["plain"])


def test_fuse_reads_everything_again(model, token_ids, replays):
    """In the middle of a text, where a step looks at less."""
    ids, plain = token_ids(1, 5), copy.deepcopy(model)
    bt.fuse(model)
    logits = []
    for one in (plain, model):
        with torch.inference_mode():
            output = one(ids, use_cache=True)
            for i in range(8):
                if i == 4:
                    one.model.layers[0].self_attn.scaling = 2.0
                    if one is model:
                        bt.fuse(model)
                token = torch.full((1, 1), 3 + i)
                output = one(token, past_key_values=output.past_key_values)
        logits.append(output.logits)
    assert len(set(replays)) == 2
    assert close(logits[1], logits[0])


def test_a_model_goes_with_its_last_reference(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    generate(model, IDS)
    gone = [weakref.ref(part) for part in (model, model.model, model.model.embed_tokens.weight)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()
