"""enable() and disable()."""

import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import bitnet_triton as bt
from bitnet_triton.errors import CheckpointError
from bitnet_triton.nn import BitLinear, PackedBitLinear

FORMATS = ["bitlinear", "packed", "codes", "online"]


@pytest.fixture
def enabled():
    bt.enable()
    yield
    bt.disable()


def ours_in(model):
    return sum(isinstance(m, (BitLinear, PackedBitLinear)) for m in model.modules())


def test_auto_classes_give_our_bitnet(checkpoint, enabled):
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert type(model) is bt.BitNetForCausalLM
    assert type(AutoModel.from_pretrained(checkpoint())) is bt.BitNetModel
    assert ours_in(model) == 14


@pytest.mark.parametrize("extra", [{}, {"bias": True, "rms_norm": True}], ids=["plain", "extra"])
@pytest.mark.parametrize("format", FORMATS)
def test_llama_style_checkpoints_get_our_linears(
    format, extra, checkpoint, load_theirs, steady_ids, logits, error, enabled
):
    folder = checkpoint(format, arch="llama", **extra)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert ours_in(model) == 14
    bt.disable()
    theirs = load_theirs(folder)
    ids = steady_ids(theirs, model)
    assert error(logits(model, ids), logits(theirs, ids)) <= 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_a_llama_saved_while_enabled_is_one_of_transformers(
    format, checkpoint, load_theirs, token_ids, logits, tmp_path, enabled
):
    folder = checkpoint(format, arch="llama", bias=True, rms_norm=True)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    bt.disable()
    ids = token_ids()
    assert torch.equal(logits(load_theirs(tmp_path), ids), logits(load_theirs(folder), ids))


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
def test_disable_brings_back_what_was(arch, checkpoint):
    folder = checkpoint("online", arch=arch)
    before = AutoModelForCausalLM.from_pretrained(folder)
    bt.enable()
    bt.enable()
    between = AutoModelForCausalLM.from_pretrained(folder)
    bt.disable()
    bt.disable()
    after = AutoModelForCausalLM.from_pretrained(folder)
    assert [ours_in(m) for m in (before, between, after)] == [0, 14, 0]
    assert type(before) is type(after)
    assert type(AutoModel.from_pretrained(folder)).__module__.startswith("transformers.")


def test_both_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        bt.enable()
        bt.disable()
    assert [r.message for r in caplog.records] == [
        "transformers loads `quant_method: bitnet` checkpoints with bitnet_triton",
        "transformers loads `quant_method: bitnet` checkpoints with its own layers",
    ]


def test_a_damaged_llama_checkpoint_is_refused(checkpoint, save_checkpoint, tmp_path, enabled):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(arch="llama"))
    tensors = model.state_dict()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.full((25, 64), 3, dtype=torch.uint8)
    model.config.save_pretrained(tmp_path)
    save_checkpoint(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: .*packed value 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_of_another_architecture_is_not_touched(checkpoint, enabled):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("dense", arch="llama"))
    assert ours_in(model) == 0
