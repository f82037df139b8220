"""fuse(model) for Llama-style checkpoints: the same logits, tokens and files as before."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import bitnet_triton as bt
from bitnet_triton.models.fused.layer import FusedLlamaLayer
from bitnet_triton.models.fused.recording import Recording

IDS = [[1, 5, 23, 71, 8, 40]]
PADDED = [[0, 0, 0, 1, 9, 30], *IDS]
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
LLAMA3 = (
    '{"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, '
    '"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}'
)


def fused(model):
    return [m for m in model.modules() if isinstance(m, FusedLlamaLayer)]


def generate(model, ids=IDS, n=10, **kwargs):
    return model.generate(
        torch.as_tensor(ids), max_new_tokens=n, eos_token_id=None, pad_token_id=0,
        do_sample=False, **kwargs,
    )  # fmt: skip


@pytest.fixture
def load(checkpoint, load_theirs):
    """A function that returns a model with our linears, unfused unless it is told otherwise."""

    def load(format="bitlinear", fuse=False, **fields):
        theirs = load_theirs(checkpoint(format, arch="llama", **fields))
        return bt.use_ternary_kernels(theirs, fuse=fuse)

    return load


@pytest.fixture
def counted(monkeypatch):
    """Count the forwards that run fused."""
    calls = []
    attend = FusedLlamaLayer._attend

    def count(layer, *args, **kwargs):
        calls.append(layer)
        return attend(layer, *args, **kwargs)

    monkeypatch.setattr(FusedLlamaLayer, "_attend", count)
    return calls


@pytest.fixture
def replays(monkeypatch, default_backend):
    """Collect the recordings that were replayed, on the backend that has them."""
    seen = []
    replay = Recording.replay

    def count(recording, *args):
        seen.append(recording)
        return replay(recording, *args)

    monkeypatch.setattr(Recording, "replay", count)
    return seen


@pytest.mark.parametrize("format", ["bitlinear", "packed", "codes"])
def test_logits_stay(format, load, steady_ids, logits, error, counted):
    model = load(format)
    ids = steady_ids(model, B=4, T=7)
    expected = logits(model, ids)
    assert bt.fuse(model) is model
    assert len(fused(model)) == 2
    assert error(logits(model, ids), expected) < 2e-5
    assert len(counted) == 2
    assert torch.equal(logits(bt.unfuse(model), ids), expected)


# the norms of an unfused Llama are PyTorch's: in the same order only the reference sums
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["bitlinear", "packed", "codes"])
def test_rounded_alike_no_bit_changes(format, dtype, load, token_ids, logits, counted):
    model = load(format, dtype=dtype)
    ids = token_ids(4, 7)
    expected = logits(model, ids)
    assert torch.equal(logits(bt.fuse(model), ids), expected)
    assert len(counted) == 2
    assert torch.equal(logits(bt.unfuse(model), ids), expected)
    assert not fused(model)


def test_it_is_the_default(load, checkpoint, log):
    assert len(fused(load(fuse=True))) == 2
    bt.enable()
    try:
        assert len(fused(AutoModelForCausalLM.from_pretrained(checkpoint(arch="llama")))) == 2
        assert log() == []
        AutoModelForCausalLM.from_pretrained(checkpoint(arch="llama", rms_norm=True))
    finally:
        bt.disable()
    (line,) = log()
    assert "LlamaForCausalLM runs its layers module by module: layer model.layers.0: " in line
    assert line.endswith("q_proj: a linear with a norm of its own cannot be fused yet")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "bitnet_triton"])
def test_batches_beams_and_static_caches_give_the_same_tokens(implementation, load, counted):
    model = load()
    model.set_attn_implementation(implementation)
    calls = [
        (IDS, {}),
        (PADDED, {"attention_mask": MASK}),
        (PADDED, {"attention_mask": MASK, "num_beams": 3}),
        (IDS, {"cache_implementation": "static"}),
    ]
    expected = [generate(model, ids, **kwargs) for ids, kwargs in calls]
    bt.fuse(model)
    for (ids, kwargs), tokens in zip(calls, expected):
        counted.clear()
        assert torch.equal(generate(model, ids, **kwargs), tokens)
        assert counted


def test_assisted_generation_and_streaming_give_the_same_tokens(load, replays):
    model = load()
    expected = generate(model)
    assistant = copy.deepcopy(bt.fuse(model))
    assert torch.equal(generate(model, assistant_model=assistant), expected)

    class Numbers:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60)
    generate(model, streamer=streamer)
    assert "".join(streamer) == Numbers().decode(expected[0, len(IDS[0]) :])


@pytest.mark.parametrize("config", ["{}", LLAMA3], ids=["default", "llama3"])
def test_recorded_steps_have_the_logits_of_single_launches(config, load, steady_ids, replays):
    model = load(config=config)
    ids = steady_ids(model, B=2, T=30)

    def steps():
        with torch.inference_mode():
            cache = model(ids[:, :20], use_cache=True).past_key_values
            tokens = ids[:, 20:].split(1, dim=1)
            return torch.cat([model(t, past_key_values=cache).logits for t in tokens], 1)

    expected = steps()
    bt.fuse(model)
    assert (steps() - expected).norm() <= 1e-5 * expected.norm()
    assert len(replays) == 9
    assert len(set(replays)) == 1


def test_padding_on_the_left_is_recorded(load, replays):
    model = load()
    expected = generate(model, PADDED, attention_mask=MASK)
    assert torch.equal(generate(bt.fuse(model), PADDED, attention_mask=MASK), expected)
    assert replays


def test_the_checkpoint_and_copies_stay(load, logits, token_ids, load_theirs, tmp_path):
    model, ids = load(fuse=True), token_ids(2, 5)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(twin)) == 2
        assert torch.equal(logits(twin, ids), expected)
    model.save_pretrained(tmp_path)
    again = load_theirs(tmp_path)
    assert type(again).__name__ == "LlamaForCausalLM"
    assert type(again).__module__.startswith("transformers.")
    assert torch.equal(logits(bt.use_ternary_kernels(again), ids), expected)


def test_hidden_states_come_from_fused_layers(load, steady_ids, error, counted):
    model = load()
    ids = steady_ids(model, B=2, T=5)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        found = bt.fuse(model)(ids, output_hidden_states=True).hidden_states
    assert len(counted) == 2
    assert len(found) == len(expected) == 3
    assert max(map(error, found, expected)) < 2e-5


def test_a_compiled_model_is_one_graph_of_fused_ops(load, steady_ids, logits, error):
    model = load(fuse=True)
    ids = steady_ids(model, B=2, T=5)
    expected = logits(model, ids, use_cache=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert error(compiled(ids, use_cache=False)[0], expected) < 2e-5
    torch.compiler.reset()
    (code,) = graphs
    for op, times in (("ternary_linear_quantized_fwd", 8), ("silu_mul_quantize_fwd", 2)):
        assert code.count(f"ops.bitnet_triton.{op}") == times


def test_gradients_take_the_layers_own_forward(load, token_ids, counted):
    model, ids = load(fuse=True), token_ids(2, 5)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()
    assert not counted


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"hidden_act": "relu"}', "mlp: expected the activation silu, got relu"),
        ('{"mlp_bias": true}', "mlp.gate_proj: a linear with a bias"),
        ('{"intermediate_size": 16388}', "down_proj: its input has 16388 values, .* most 16384"),
    ],
)
def test_what_is_no_plain_llama_is_named(config, reason, load):
    model = load(config=config)
    with pytest.raises(ValueError, match=reason):
        bt.fuse(model)
    assert not fused(model)
