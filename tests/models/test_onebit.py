"""Checkpoints of 1bitLLM: a Llama by their config, with norms that a Llama has no place for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import bitnet_triton as bt
from bitnet_triton.errors import CheckpointError
from bitnet_triton.models.convert import convert_checkpoint

LOADERS = [
    AutoModelForCausalLM,
    AutoModel,
    LlamaForCausalLM,
    LlamaModel,
    LlamaForSequenceClassification,
]
NORMS = {
    "model.layers.0.self_attn.inner_attn_ln.weight": 64,
    "model.layers.1.mlp.ffn_layernorm.weight": 100,
    "model.layers.1.mlp.down_proj.norm.weight": 100,
    "model.layers.0.self_attn.q_proj.rms_norm.weight": 64,
}


@pytest.fixture
def enabled():
    bt.enable()
    yield
    bt.disable()


@pytest.fixture
def onebit(checkpoint, tmp_path):
    """A function that writes a dense Llama with more fields in its config, and more tensors."""

    def write(fields=None, norms=()):
        folder = tmp_path / "onebit"
        shutil.copytree(checkpoint("dense", arch="llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **(fields or {})}))
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: torch.ones(NORMS[name]) for name in norms}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("has_config", [False, True], ids=["path", "config"])
def test_the_config_tells(loader, has_config, onebit, enabled):
    folder = onebit({"weight_bits": 1, "input_bits": 8})
    given = {"config": AutoConfig.from_pretrained(folder)} if has_config else {}
    with pytest.raises(CheckpointError, match=r"`weight_bits: 1` .* 1bitLLM.*2B-4T"):
        loader.from_pretrained(folder, **given)


@pytest.mark.parametrize("loader", LOADERS[:3], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("name", NORMS)
def test_norms_inside_a_layer_tell(name, loader, onebit, enabled):
    folder = onebit(norms=[name])
    with pytest.raises(CheckpointError, match=rf"{name} is a norm inside a layer.*2B-4T"):
        loader.from_pretrained(folder)


def test_our_own_ways_refuse_it_too(onebit, tmp_path):
    folder = onebit({"weight_bits": 1})
    with pytest.raises(ValueError, match="1bitLLM"):
        bt.BitNetForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`model`: `weight_bits: 1`"):
        bt.use_ternary_kernels(LlamaForCausalLM.from_pretrained(folder))  # not enabled: it loads
    with pytest.raises(CheckpointError, match="1bitLLM"):
        convert_checkpoint(folder, tmp_path / "packed")


@pytest.mark.parametrize("fields", [{}, {"weight_bits": 16}], ids=["plain", "16 bits"])
def test_another_llama_is_loaded_as_ever(fields, onebit, enabled):
    folder = onebit(fields)
    loaded, told = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_class_with_such_norms_of_its_own_is_let_alone(onebit, enabled):
    class Remote(LlamaForCausalLM):
        pass

    folder = onebit({"weight_bits": 1}, norms=NORMS)
    assert isinstance(Remote.from_pretrained(folder), Remote)


def test_disable_undoes_it(onebit, enabled):
    folder = onebit({"weight_bits": 1}, norms=NORMS)
    bt.enable()  # a second time changes nothing
    bt.disable()
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM)
