"""use_ternary_kernels on models that transformers loaded."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitnet_triton as bt
from bitnet_triton.nn import BitLinear, PackedBitLinear

FORMATS = ["bitlinear", "packed", "codes", "online"]
ARCHS = ["bitnet", "llama"]
EXTRAS = [{}, {"bias": True, "rms_norm": True}, {"tied": True}]


def kinds(model):
    return {n: type(m) for n, m in model.named_modules() if n.endswith("_proj")}


@pytest.mark.parametrize("extra", EXTRAS, ids=["plain", "bias-rms_norm", "tied"])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", FORMATS)
def test_logits_stay(format, arch, extra, checkpoint, load_theirs, steady_ids, logits, error):
    model = load_theirs(checkpoint(format, arch=arch, **extra))
    ids = steady_ids(model)
    expected = logits(model, ids)

    assert bt.use_ternary_kernels(model) is model
    assert set(kinds(model).values()) == {BitLinear if format == "online" else PackedBitLinear}
    assert error(logits(model, ids), expected) <= 1e-4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", FORMATS)
def test_saving_afterwards_gives_a_checkpoint_of_transformers(
    format, arch, checkpoint, load_theirs, token_ids, logits, tmp_path
):
    folder = checkpoint(format, arch=arch, bias=True, rms_norm=True)
    bt.use_ternary_kernels(load_theirs(folder)).save_pretrained(tmp_path)
    ids = token_ids()
    again = load_theirs(tmp_path)
    assert type(again).__module__.startswith("transformers.")
    assert torch.equal(logits(again, ids), logits(load_theirs(folder), ids))


def test_a_second_call_changes_nothing(checkpoint, load_theirs):
    model = bt.use_ternary_kernels(load_theirs(checkpoint(arch="llama")))
    layers = [m for m in model.modules() if isinstance(m, PackedBitLinear)]
    assert bt.use_ternary_kernels(model) is model
    assert [m for m in model.modules() if isinstance(m, PackedBitLinear)] == layers


def test_a_model_of_ours_stays_as_it_is(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint())
    before = kinds(model)
    assert bt.use_ternary_kernels(model) is model
    assert kinds(model) == before


def test_weights_shrink_to_two_bits(checkpoint, load_theirs):
    model = load_theirs(checkpoint("packed", arch="llama"))
    before = model.model.layers[0].self_attn.q_proj.weight
    bt.use_ternary_kernels(model)
    after = model.model.layers[0].self_attn.q_proj.weight
    assert (before.dtype, after.dtype) == (torch.float32, torch.uint8)
    assert before.nbytes == 16 * after.nbytes


def test_master_weights_are_shared_and_stay_trainable(checkpoint, load_theirs):
    model = load_theirs(checkpoint("online", arch="llama"))
    before = model.model.layers[0].self_attn.q_proj.weight
    bt.use_ternary_kernels(model)
    assert model.model.layers[0].self_attn.q_proj.weight is before
    assert before.requires_grad


def test_a_dense_model_is_refused(checkpoint, load_theirs):
    model = load_theirs(checkpoint("dense", arch="llama"))
    with pytest.raises(ValueError, match=r"`quant_method: bitnet`.*got LlamaForCausalLM"):
        bt.use_ternary_kernels(model)


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [
        ("bitlinear", lambda m: m.weight.fill_(255), "up_proj: `packed`: expected codes 0, 1 or 2"),
        ("bitlinear", lambda m: m.weight_scale.fill_(0), "up_proj: `scale`: expected a positive"),
        ("packed", lambda m: m.weight_scale.fill_(torch.nan), "up_proj: `scale`: .*got nan"),
        ("packed", lambda m: m.weight.data.fill_(0.5), "up_proj: expected codes -1, 0 and 1"),
        ("packed", lambda m: m.to("meta"), "up_proj: its weight is offloaded"),
    ],
)
def test_an_error_names_the_layer_and_leaves_the_model_as_it_was(
    format, damage, message, checkpoint, load_theirs
):
    model = load_theirs(checkpoint(format, arch="llama"))
    damage(model.model.layers[1].mlp.up_proj)
    modules = dict(model.named_modules())
    conversions = copy.copy(model._weight_conversions)
    with pytest.raises(ValueError, match=f"`model`: layer model.layers.1.mlp.{message}"):
        bt.use_ternary_kernels(model)
    assert dict(model.named_modules()) == modules
    assert model._weight_conversions == conversions


def test_generation_is_that_of_transformers(checkpoint, load_theirs):
    model = load_theirs(checkpoint("online", arch="llama"))
    ids = torch.tensor([[5, 23, 71, 8]])  # always the same: near a tie two tokens may be as likely
    with torch.compiler.set_stance("force_eager"):
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    result = bt.use_ternary_kernels(model).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(result, expected)


def test_auto_classes_stay_those_of_transformers(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("online"))
    assert type(model).__module__.startswith("transformers.")
    assert not any(isinstance(m, BitLinear) for m in model.modules())
