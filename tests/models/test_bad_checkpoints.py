"""Damaged, mismatched and dangerous checkpoints: one clear error, and nothing is returned."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import bitnet_triton as bt
from bitnet_triton.kernels import ternary_linear

UP = "model.layers.1.mlp.up_proj.weight"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def damaged(checkpoint, save_checkpoint, tmp_path):
    """A function that copies a checkpoint, changes its tensors, and returns the new folder."""

    def make(change, format="packed", shards=1, **fields):
        source = checkpoint(format, **fields)
        shutil.copy(source / "config.json", tmp_path)
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_checkpoint(tensors, tmp_path, shards)
        return tmp_path

    return make


@pytest.fixture
def copy_of(checkpoint, tmp_path):
    """A function that copies a checkpoint and returns the new folder."""
    return lambda *args, **fields: shutil.copytree(
        checkpoint(*args, **fields), tmp_path, dirs_exist_ok=True
    )


def refused(folder, match, error=bt.CheckpointError, **kwargs):
    with pytest.raises(error, match=match):
        bt.BitNetForCausalLM.from_pretrained(folder, **kwargs)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def code_three(tensors):
    tensors[UP][-1, -1] |= 0b11000000


@pytest.mark.parametrize("format", ["bitlinear", "packed"])
@pytest.mark.parametrize("place", [0, 1, 7, 8, 799, 1599])
@pytest.mark.parametrize("plane", range(4))
def test_a_packed_value_of_three(plane, place, format, damaged):
    def change(tensors):
        tensors[UP].view(-1)[place] |= 3 << (2 * plane)

    refused(damaged(change, format), f"{UP}: holds the packed value 3")


def test_a_packed_value_of_three_in_the_last_odd_bytes(checkpoint, save_checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint())
    config.intermediate_size = 68  # 17 packed rows of 17 codes in the gates: no multiple of 8 bytes
    config.hidden_size, config.head_dim = 68, 16
    with torch.device("meta"):
        model = bt.BitNetForCausalLM(config)
    model.to_empty(device="cpu")
    tensors = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    assert tensors[UP].numel() % 8 == 4
    config.save_pretrained(tmp_path)
    save_checkpoint(tensors, tmp_path)
    bt.BitNetForCausalLM.from_pretrained(tmp_path)
    tensors[UP][-1, -1] = 0b11
    save_checkpoint(tensors, tmp_path)
    refused(tmp_path, f"{UP}: holds the packed value 3")


@pytest.mark.parametrize("value", [0.5, 2.0, torch.nan, torch.inf])
def test_codes_that_are_none(value, damaged):
    folder = damaged(lambda tensors: tensors[UP][3, 5].fill_(value), "codes")
    refused(folder, f"{UP}: expected codes -1, 0 and 1")


@pytest.mark.parametrize("format", ["bitlinear", "packed", "codes"])
@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, -torch.inf])
def test_a_scale_that_is_none(value, format, damaged):
    folder = damaged(put(SCALE, torch.tensor([value])), format)
    refused(folder, f"{SCALE}: expected a positive finite scale, got .*{value}")


@pytest.mark.parametrize(
    ("format", "name", "value", "message"),
    [
        ("packed", UP, torch.zeros(25, 65, dtype=torch.uint8), r"shape \[25, 64\], got \[25, 65\]"),
        ("packed", UP, torch.zeros(25, 64), "expected packed uint8, got F32"),
        ("packed", UP, torch.zeros(25, 64, dtype=torch.int8), "expected packed uint8, got I8"),
        ("packed", SCALE, torch.ones(2), r"expected shape \[1\], got \[2\]"),
        ("packed", SCALE, torch.ones(1, dtype=torch.int64), "expected floating point, got I64"),
        ("codes", UP, torch.zeros(100, 64, dtype=torch.int32), "expected codes, got I32"),
        ("codes", UP, torch.zeros(100, 64, dtype=torch.uint8), "expected codes, got U8"),
        ("online", UP, torch.zeros(100, 64, dtype=torch.int8), "expected floating point, got I8"),
        ("online", UP, torch.zeros(25, 64, dtype=torch.uint8), r"expected shape \[100, 64\]"),
        ("dense", NORM, torch.ones(63), r"expected shape \[64\], got \[63\]"),
        ("dense", EMBED, torch.ones(96, 64, dtype=torch.int64), "expected floating point, got I64"),
    ],
)
def test_a_wrong_shape_or_dtype(format, name, value, message, damaged):
    refused(damaged(put(name, value), format), f"{name}: .*{message}")


@pytest.mark.parametrize("name", [UP, NORM, "lm_head.weight", EMBED])
@pytest.mark.parametrize("format", ["bitlinear", "packed", "online", "dense"])
def test_a_missing_tensor(format, name, damaged):
    refused(damaged(lambda tensors: tensors.pop(name), format), f"the checkpoint lacks {name}")


def test_parameters_of_a_mode_are_missing_with_the_way_to_them(tmp_path, damaged):
    with pytest.raises(bt.CheckpointError, match=r"lacks .*'linear' brings .*set_attention"):
        bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention="linear")
    # with anything else missing it is no way
    folder = damaged(lambda tensors: tensors.pop(NORM), "dense")
    with pytest.raises(bt.CheckpointError) as error:
        bt.BitNetForCausalLM.from_pretrained(folder, attention="linear")
    assert "set_attention" not in str(error.value)
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    bt.set_attention(model, "linear").save_pretrained(tmp_path / "model")
    bt.BitNetForCausalLM.from_pretrained(tmp_path / "model")


def test_missing_scales_are_counted(damaged):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            del tensors[name]

    refused(damaged(change), "the checkpoint lacks model.layers.0.*and 11 more")


@pytest.mark.parametrize("format", ["packed", "online", "dense"])
def test_an_extra_tensor(format, damaged):
    folder = damaged(put("model.layers.2.mlp.up_proj.weight", torch.zeros(4, 64)), format)
    refused(folder, r"the checkpoint holds model\.layers\.2\.mlp\.up_proj\.weight")


def test_a_tensor_in_two_shards(damaged):
    folder = damaged(lambda tensors: None, shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    shutil.copy(shard, folder / "model-00002-of-00002.safetensors")
    refused(folder, "stands in model-00001-of-00002.safetensors and in model-00002")


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_truncated_shard(format, keep, copy_of):
    shard = copy_of(format, shards=3) / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(shard.parent, "model-00002-of-00003.safetensors: damaged or truncated")


def test_a_truncated_file_without_dtype_in_the_config(copy_of):
    folder = copy_of("packed")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(folder, "model.safetensors: damaged or truncated")


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_an_absent_shard(format, copy_of):
    folder = copy_of(format, shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(folder, "model-00003-of-00003.safetensors: named in model.safetensors.index.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"metadata": {}, "weight_map": []}'])
def test_a_damaged_index(text, copy_of):
    folder = copy_of("packed", shards=3)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json: ")


class Bomb:
    """Unpickling it shows that a pickle was read."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
def test_a_pickle_is_never_read(arch, copy_of):
    folder = copy_of("packed", arch=arch)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    if arch == "bitnet":
        refused(folder, "pytorch_model.bin: .*pickled weights are never read")
        refused(folder, "pytorch_model.bin: .*pickled", use_safetensors=False)
        return
    bt.enable()
    try:
        with pytest.raises(bt.CheckpointError, match=r"pytorch_model\.bin: .*never read"):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        bt.disable()


def test_a_pickled_adapter_is_never_read(checkpoint, tmp_path):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(checkpoint("online")),
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "adapter_model.bin: .*pickled weights are never read")


def test_a_pickled_variant_is_never_read(copy_of):
    folder = copy_of("dense")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.fp16.bin").write_bytes(pickle.dumps(Bomb()))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # transformers would read it from the first file
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "no file named model.fp16.safetensors", error=OSError, variant="fp16")


def test_a_folder_without_weights(copy_of):
    folder = copy_of("packed")
    (folder / "model.safetensors").unlink()
    refused(folder, "no file named model.safetensors", error=OSError)


@pytest.mark.parametrize("from_config", [False, True])
def test_another_model_type(from_config, checkpoint):
    folder = checkpoint("packed", arch="llama")
    config = {"config": LlamaConfig.from_pretrained(folder)} if from_config else {}
    refused(folder, r"'llama'.*bitnet_triton\.use_ternary_kernels", error=ValueError, **config)


def test_another_quantisation(copy_of):
    folder = copy_of("packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "`quant_method`: expected 'bitnet', got 'gptq'", error=ValueError)


@pytest.mark.parametrize(("format", "other"), [("packed", "online"), ("online", "packed")])
def test_weights_of_another_format_than_the_config_says(format, other, checkpoint, copy_of):
    folder = copy_of(format)
    shutil.copy(checkpoint(other) / "config.json", folder)
    refused(folder, "the checkpoint (lacks|holds) .*weight_scale")


def test_a_width_that_does_not_pack():
    config = bt.BitNetConfig(
        hidden_size=64,
        intermediate_size=98,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        quantization_config={"quant_method": "bitnet"},
    )
    message = r"layers\.0\.mlp\.gate_proj: `out_features`: expected a multiple of 4, got 98"
    with pytest.raises(ValueError, match=message):
        bt.BitNetForCausalLM(config)


def test_the_check_comes_before_any_kernel_and_any_weight(damaged, monkeypatch):
    folder = damaged(code_three)
    loaded = []
    loader = bt.BitNetForCausalLM._load_pretrained_model
    monkeypatch.setattr(
        bt.BitNetForCausalLM,
        "_load_pretrained_model",
        staticmethod(lambda *args, **kwargs: loaded.append(args) or loader(*args, **kwargs)),
    )
    monkeypatch.setattr("bitnet_triton.nn.bit_linear.ternary_linear", loaded.append)
    refused(folder, "packed value 3")
    assert loaded == []
    assert callable(ternary_linear)


def test_a_good_copy_loads(damaged):
    folder = damaged(lambda tensors: None, shards=2)
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.keys()
    assert bt.BitNetForCausalLM.from_pretrained(folder) is not None
