"""Loading for inference fuses, says why where it cannot, and can be told not to."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import bitnet_triton as bt
from bitnet_triton.models.fuse import FusedDecoderLayer


def fused(model):
    return sum(isinstance(m, FusedDecoderLayer) for m in model.modules())


def load(folder, **kwargs):
    return bt.BitNetForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture
def enabled():
    bt.enable()
    yield
    bt.disable()


@pytest.mark.parametrize("format", ["bitlinear", "packed", "codes"])
def test_a_packed_checkpoint_is_fused_unless_told_otherwise(
    format, checkpoint, steady_ids, logits, error, log
):
    model, plain = load(checkpoint(format)), load(checkpoint(format), fuse=False)
    assert (fused(model), fused(plain)) == (2, 0)
    ids = steady_ids(plain, B=4, T=7)
    assert error(logits(model, ids), logits(plain, ids)) < 2e-5
    assert log() == []


def test_the_models_beside_the_first_way_are_fused_too(checkpoint, load_theirs, enabled):
    assert fused(AutoModelForCausalLM.from_pretrained(checkpoint())) == 2
    assert fused(AutoModelForCausalLM.from_pretrained(checkpoint(), fuse=False)) == 0
    assert fused(AutoModel.from_pretrained(checkpoint())) == 2
    assert fused(bt.BitNetModel.from_pretrained(checkpoint(), fuse=False)) == 0
    bt.disable()
    for fuse in (True, False):
        model = bt.use_ternary_kernels(load_theirs(checkpoint()), fuse=fuse)
        assert fused(model) == 2 * fuse
    assert fused(bt.use_ternary_kernels(model)) == 2  # its linears are ours already


def test_what_else_transformers_returns_is_there(checkpoint):
    model, info = load(checkpoint(), output_loading_info=True)
    assert fused(model) == 2
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"format": "online"}, "q_proj: expected packed ternary weights, got BitLinear"),
        ({"format": "dense"}, "q_proj: expected packed ternary weights, got Linear"),
        ({"bias": True}, "q_proj: a linear with a bias"),
    ],
    ids=str,
)
def test_one_line_says_why_a_model_is_not_fused(variant, reason, checkpoint, log):
    assert fused(load(checkpoint(**variant))) == 0
    (line,) = log()
    assert line.startswith("BitNetForCausalLM runs its layers module by module: layer model.lay")
    assert reason in line


def test_training_masters_is_left_alone(checkpoint, token_ids):
    model = load(checkpoint("online")).train()
    ids = token_ids(2, 5)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_model_that_has_run_can_be_pickled_and_copied(checkpoint, token_ids, logits):
    model, ids = load(checkpoint()), token_ids(2, 5)
    expected = logits(model, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model),
    ):
        assert fused(twin) == 2
        attention = twin.model.layers[0].self_attn
        weights = [attention.get_submodule(f"{name}_proj").weight for name in "qkv"]
        # one below the other in one matrix, each with a storage of its own
        ends = [w.data_ptr() + w.nbytes for w in weights]
        assert [w.data_ptr() for w in weights[1:]] == ends[:2]
        assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights)
        assert torch.equal(logits(twin, ids), expected)


def test_a_model_that_was_cast_compiles_without_a_graph_break(
    checkpoint, steady_ids, logits, error
):
    model = load(checkpoint()).to(torch.float64).to(torch.float32)
    ids = steady_ids(model, B=2, T=5)
    expected = logits(model, ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert error(compiled(ids, use_cache=False)[0], expected) < 2e-5
    torch.compiler.reset()


def test_projections_that_are_added_later_are_used(checkpoint, token_ids, logits):
    attention = {"mode": "longformer", "window": 2, "global_tokens": [0, 3]}
    model = load(checkpoint(), attention=attention)
    assert fused(model) == 2
    bt.add_global_projections(model)
    for layer in model.model.layers:
        weight = layer.self_attn.longformer.q_proj.weight
        weight.copy_(weight.flip(0))
    ids = token_ids(2, 6)
    assert torch.equal(logits(model, ids), logits(bt.unfuse(model), ids))
