"""What saves, copies or compares tensors by their storage keeps every weight of a fused model."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import find_tied_parameters, id_tensor_storage
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import AutoModelForCausalLM

import bitnet_triton as bt


def load(folder):
    return bt.BitNetForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=["bitnet", "llama", "unfused again"])
def model(request, checkpoint):
    if request.param == "llama":
        bt.enable()
        try:
            return AutoModelForCausalLM.from_pretrained(checkpoint(arch="llama")).eval()
        finally:
            bt.disable()
    model = load(checkpoint())
    return bt.unfuse(model) if request.param == "unfused again" else model


@pytest.fixture
def expected(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_accelerate_saves_every_tensor(model, expected, tmp_path):
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    assert_same(load_file(tmp_path / "model.safetensors"), expected)


def test_accelerate_saves_every_tensor_in_several_files(model, expected, tmp_path):
    Accelerator(cpu=True).save_model(model, str(tmp_path), max_shard_size="20KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert_same({k: v for file in files for k, v in load_file(file).items()}, expected)


def test_safetensors_saves_and_loads_a_model(model, expected, tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(model, file)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(expected)
    for tensor in model.state_dict().values():
        tensor.zero_()
    load_model(model, file)
    assert_same(model.state_dict(), expected)


def test_safetensors_saves_a_state_dict(model, expected, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same(load_file(tmp_path / "model.safetensors"), expected)


def test_no_two_tensors_share_a_storage(model):
    state = model.state_dict()
    assert len({id_tensor_storage(tensor) for tensor in state.values()}) == len(state)
    assert find_tied_parameters(model) == []
    for name, tensor in state.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("what", ["model", "state_dict"])
def test_torch_save_writes_each_byte_once(what, model, expected):
    file = io.BytesIO()
    torch.save(model if what == "model" else model.state_dict(), file)
    tensors = sum(tensor.nbytes for tensor in expected.values())
    assert file.tell() < tensors + 150_000  # names, classes and headers of a hundred tensors
    file.seek(0)
    read = torch.load(file, weights_only=what == "state_dict")
    assert_same(read.state_dict() if what == "model" else read, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same_and_shares_nothing(copied, model, expected, token_ids, logits):
    ids = token_ids(2, 5)
    before = logits(model, ids)
    other = copied(model)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert_same(other.state_dict(), expected)
    assert torch.equal(logits(other, ids), before)


def test_a_distributed_checkpoint_holds_every_tensor(model, expected, token_ids, logits, tmp_path):
    ids = token_ids(2, 5)
    before = logits(model, ids)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    for tensor in model.state_dict().values():
        tensor.zero_()
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(model, state)
    assert_same(model.state_dict(), expected)
    assert torch.equal(logits(model, ids), before)


def test_unfuse_lets_the_merged_matrices_go(checkpoint):
    model = load(checkpoint())
    layer = model.model.layers[0]
    merged = [
        weakref.ref(part.weight().packed) for part in (layer.fusion.qkv, layer.fusion.gate_up)
    ]
    bt.unfuse(model)
    gc.collect()
    assert [whole() for whole in merged] == [None, None]


@pytest.mark.parametrize("format", ["packed", "bitlinear"])
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
@pytest.mark.usefixtures("default_backend")
def test_new_data_computes_from_the_next_prompt_on(
    format, name, checkpoint, token_ids, logits, error
):
    model, ids = load(checkpoint(format)), token_ids(4, 6)

    def write():
        """Return the tokens that the model writes, and the logits it took them from."""
        wanted = {"output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, **wanted)
        return out.sequences, torch.stack(out.logits, 1)

    # so that branches count for more: a scale of `bitlinear` divides
    factor = 0.2 if format == "bitlinear" else 5.0
    for _ in range(2):
        _, before = write()
        for layer in model.model.layers:
            for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
                buffer = getattr(linear, name)
                # every code of the other sign: 2 - (w + 1), without a borrow between codes
                buffer.data = 0b10101010 - buffer if name == "weight" else buffer * factor
        written, after = write()
        assert error(before, after) > 0.1
        unfused = logits(bt.unfuse(copy.deepcopy(model)), written)[:, 5:-1]
        assert error(after, unfused) < 0.05  # an activation near a tie may round otherwise
