"""fuse(model): the same logits, tokens and checkpoints as the layers one by one."""

import copy

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import bitnet_triton as bt
from bitnet_triton.models.fuse import FusedDecoderLayer
from bitnet_triton.nn import PackedBitLinear

# to float32 rounding, on tokens whose activations stay away from ties
CLOSE = 2e-5
IDS = [[1, 5, 23, 71, 8, 40]]
SIZES = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def unfused(folder, **kwargs):
    return bt.BitNetForCausalLM.from_pretrained(folder, fuse=False, **kwargs)


@pytest.fixture
def model(checkpoint):
    return unfused(checkpoint("packed"))


@pytest.fixture(scope="module")
def embedded():
    return unfused(bt.TINY_MODEL)


@pytest.fixture
def counted(monkeypatch):
    """Count the forwards that run fused."""
    calls = []
    attend = FusedDecoderLayer._attend

    def count(layer, *args, **kwargs):
        calls.append(layer)
        return attend(layer, *args, **kwargs)

    monkeypatch.setattr(FusedDecoderLayer, "_attend", count)
    return calls


def layers(model):
    return [m for m in model.modules() if isinstance(m, FusedDecoderLayer)]


def generate(model, ids, **kwargs):
    return model.generate(
        torch.as_tensor(ids), max_new_tokens=8, eos_token_id=None, pad_token_id=0,
        do_sample=False, **kwargs,
    )  # fmt: skip


def memory(model):
    tensors = {t.untyped_storage().data_ptr(): t for t in model.state_dict().values()}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("format", ["bitlinear", "packed", "codes"])
def test_logits_stay(format, checkpoint, steady_ids, logits, error, counted):
    model = unfused(checkpoint(format))
    ids = steady_ids(model, B=4, T=7)
    expected = logits(model, ids)
    assert bt.fuse(model) is model
    assert error(logits(model, ids), expected) < CLOSE
    assert len(counted) == 2


def test_a_model_of_transformers_is_fused_after_its_linears_are_ours(
    checkpoint, load_theirs, steady_ids, logits, error, counted
):
    model = bt.use_ternary_kernels(load_theirs(checkpoint("bitlinear")), fuse=False)
    ids = steady_ids(model, B=4, T=7)
    expected = logits(model, ids)
    assert error(logits(bt.fuse(model), ids), expected) < CLOSE
    assert counted


def test_an_attention_plan_is_followed(checkpoint, token_ids, logits, counted):
    model = unfused(checkpoint(), attention="full")
    ids = token_ids(2, 7)
    expected = logits(model, ids)
    assert torch.equal(logits(bt.fuse(model), ids), expected)
    assert counted


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_beams_and_static_caches_give_the_same_tokens(implementation, checkpoint, counted):
    model = unfused(checkpoint(), attn_implementation=implementation)
    padded = [[0, 0, 0, 1, 9, 30], *IDS]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    calls = [
        (IDS, {}),
        (padded, {"attention_mask": mask}),
        (padded, {"attention_mask": mask, "num_beams": 3}),
        (IDS, {"cache_implementation": "static"}),
    ]
    expected = [generate(model, ids, **kwargs) for ids, kwargs in calls]
    bt.fuse(model)
    for (ids, kwargs), tokens in zip(calls, expected):
        counted.clear()
        assert torch.equal(generate(model, ids, **kwargs), tokens)
        assert counted


def test_the_embedded_model_writes_the_same_tokens_on_the_default_backend(
    embedded, default_backend, logits, error, counted
):
    model = copy.deepcopy(embedded)
    ids = torch.arange(3, 19).view(2, 8)
    expected = logits(model, ids), generate(model, ids)
    bt.fuse(model)
    assert error(logits(model, ids), expected[0]) <= 1e-2
    assert torch.equal(generate(model, ids), expected[1])
    assert counted


def test_memory_stays_and_the_parts_lie_in_one_matrix(model):
    before = memory(model)
    bt.fuse(model)
    assert memory(model) == before
    layer = model.model.layers[0]
    whole = layer.fusion.qkv.weight().packed
    start = whole.data_ptr()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).weight
        assert weight.data_ptr() == start
        start += weight.numel()
    assert start == whole.data_ptr() + whole.numel()


def test_the_checkpoint_stays(model, logits, token_ids, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = token_ids(2, 5)
    expected = logits(model, ids)
    bt.fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = unfused(tmp_path)
    assert not layers(again)
    assert torch.equal(logits(again, ids), expected)


def test_weights_that_are_loaded_afterwards_are_used(model, checkpoint, logits, token_ids):
    ids = token_ids(2, 5)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, PackedBitLinear):
            module.weight_scale.mul_(1.5)
            module.weight = module.weight.flip(1).contiguous()
    expected = logits(bt.fuse(copy.deepcopy(other)), ids)
    bt.fuse(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_holds_for_the_fused_layers(dtype, model, logits, token_ids, counted):
    ids = token_ids(2, 5)
    expected = logits(bt.fuse(copy.deepcopy(model).to(dtype)), ids)
    counted.clear()
    bt.fuse(model).to(dtype)
    assert torch.equal(logits(model, ids), expected)
    assert counted


def test_a_copy_is_independent(model, logits, token_ids):
    ids = token_ids(2, 5)
    expected = logits(bt.fuse(model), ids)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert len(layers(twin)) == 2
    assert torch.equal(logits(twin, ids), expected)


def test_unfusing_gives_the_layers_back(model, logits, steady_ids, error, counted):
    ids = steady_ids(model, B=2, T=5)
    expected = logits(model, ids)
    kinds = [type(module) for module in model.modules()]
    assert bt.unfuse(bt.fuse(bt.fuse(model))) is model
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model, ids), expected)
    assert not counted
    assert error(logits(bt.fuse(model), ids), expected) < CLOSE
    assert counted


def test_gradients_and_training_take_the_layers_own_forward(model, token_ids, counted):
    bt.fuse(model)
    ids = token_ids(2, 5)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()
    with torch.no_grad():
        model.train()(ids)
        model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert not counted
    with torch.no_grad():
        model.eval()(ids)
    assert counted


def test_hidden_states_and_attentions_are_those_of_the_unfused_model(
    checkpoint, token_ids, counted
):
    model = unfused(checkpoint(), attn_implementation="eager")
    ids = token_ids(2, 5)

    def outputs():
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
            return *hidden, *model(ids, output_attentions=True).attentions

    expected = outputs()
    bt.fuse(model)
    assert all(map(torch.equal, outputs(), expected))
    assert len(counted) == 2  # hidden states come from fused layers
    with torch.no_grad():
        model(ids)
    assert len(counted) == 4


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def test_what_a_user_hangs_into_a_layer_is_respected(model, logits, steady_ids, error, counted):
    adapted = copy.deepcopy(model)
    mlp = adapted.model.layers[0].mlp
    mlp.gate_proj = Adapter(mlp.gate_proj)
    ids = steady_ids(model, adapted, B=2, T=5)
    bt.fuse(model)
    expected = logits(model, ids)
    layer = model.model.layers[0]
    seen = []
    handle = layer.mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args))
    counted.clear()
    assert error(logits(model, ids), expected) < CLOSE
    assert len(seen) == len(counted) == 1
    handle.remove()

    layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)
    changed = logits(model, ids)
    assert error(changed, expected) > 1e-3
    assert error(logits(adapted, ids), changed) < CLOSE
    assert error(logits(bt.unfuse(model), ids), changed) < CLOSE


def test_autocast_and_the_compiled_backend_take_the_layers_own_forward(model, token_ids, counted):
    bt.fuse(model)
    ids = token_ids(2, 5)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        with bt.use_backend("compile"), torch.compiler.set_stance("force_eager"):
            model(ids)
    assert not counted


def test_a_compiled_model_is_fused_without_a_graph_break(model, steady_ids, logits, error):
    ids = steady_ids(model, B=2, T=5)
    expected = logits(model, ids, use_cache=False)
    bt.fuse(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert error(compiled(ids, use_cache=False)[0], expected) < CLOSE
    torch.compiler.reset()
    (code,) = graphs
    assert code.count("ops.bitnet_triton.ternary_linear_quantized_fwd") == 8


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"format": "online"}, r"layer model.layers.0: self_attn.q_proj: .* got BitLinear"),
        ({"format": "dense"}, r"self_attn.q_proj: expected packed ternary weights, got Linear"),
        ({"bias": True}, "self_attn.q_proj: a linear with a bias"),
        ({"rms_norm": True}, "self_attn.q_proj: a linear with a norm of its own"),
        ({"config": '{"hidden_act": "silu"}'}, "mlp: expected the activation relu2, got silu"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_fused_is_named_and_left(variant, message, checkpoint):
    model = unfused(checkpoint(**variant))
    with pytest.raises(ValueError, match=f"`model`: .*{message}"):
        bt.fuse(model)
    assert not layers(model)


def test_another_architecture_is_refused():
    config = {**SIZES, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**config))
    with pytest.raises(ValueError, match=r"`model`: .*got MistralForCausalLM without any"):
        bt.fuse(model)
    assert bt.unfuse(model) is model


def test_offloaded_layers_are_refused(model):
    model.model.layers[1]._hf_hook = object()
    with pytest.raises(ValueError, match=r"layer model.layers.1: accelerate moves"):
        bt.fuse(model)
    assert not layers(model)


def test_an_attention_layer_of_another_class_is_refused(model):
    class OtherAttention(type(model.model.layers[0].self_attn)):
        pass

    model.model.layers[1].self_attn.__class__ = OtherAttention
    with pytest.raises(ValueError, match=r"expected BitNetAttention .*, got OtherAttention"):
        bt.fuse(model)
    assert not layers(model)
