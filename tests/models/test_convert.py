"""Converting checkpoints: exact codes, all or nothing, nothing lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bitnet import BitNetForCausalLM as HfBitNetForCausalLM

import bitnet_triton as bt
from bitnet_triton.kernels import TernaryWeight, quantize_weight
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.models.quantizer import replace_linears

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def masters(tmp_path):
    config = bt.BitNetConfig(**SIZES, tie_word_embeddings=True)
    folder = tmp_path / "masters"
    bt.BitNetForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(autouse=True)
def _reference_backend():
    with bt.use_backend("reference"):
        yield


@pytest.fixture
def logits(steady_ids):
    """A function that loads models by class and folder, and returns their logits of one text."""

    def run(*sources):
        models = [kind.from_pretrained(folder) for kind, folder in sources]
        ids = steady_ids(*models, B=1, T=9)
        with torch.inference_mode():
            return [model(ids).logits for model in models]

    return run


def test_packed_codes_and_scale_are_those_of_the_quantiser(masters, tmp_path):
    done = convert_checkpoint(masters, tmp_path / "packed")
    before = load_file(masters / "model.safetensors")
    after = load_file(tmp_path / "packed" / "model.safetensors")
    codes, scale = quantize_weight(before[f"{LAYER}.weight"])
    assert torch.equal(after[f"{LAYER}.weight_scale"], scale)
    packed = TernaryWeight.from_checkpoint(after[f"{LAYER}.weight"], scale)
    assert torch.equal(packed.codes(), codes)
    assert done.layers == 14
    assert done.bytes_after < done.bytes_before


def test_transformers_reads_the_packed_checkpoint(masters, tmp_path, logits):
    convert_checkpoint(masters, tmp_path / "packed")
    theirs, ours = logits(
        (HfBitNetForCausalLM, tmp_path / "packed"), (bt.BitNetForCausalLM, tmp_path / "packed")
    )
    assert (theirs - ours).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_and_there_keeps_every_code(masters, tmp_path, dtype):
    first, back, again = (tmp_path / name for name in ("first", "back", "again"))
    convert_checkpoint(masters, first)
    convert_checkpoint(first, back, to="masters", dtype=dtype)
    convert_checkpoint(back, again)
    before = load_file(first / "model.safetensors")
    after = load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(tensor, after[name])
        elif name.endswith("weight_scale"):
            torch.testing.assert_close(
                after[name], tensor, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-9
            )
    assert json.loads((back / "config.json").read_text())["quantization_config"] == ONLINE


def test_masters_written_back_give_the_logits_of_the_packed_model(masters, tmp_path, logits):
    convert_checkpoint(masters, tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "back", to="masters", dtype=torch.float32)
    packed, back = logits(*((bt.BitNetForCausalLM, tmp_path / name) for name in ("packed", "back")))
    assert (packed - back).norm() <= 1e-5 * packed.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masters_written_back_keep_dtype_and_scale(dtype, masters, tmp_path):
    bt.BitNetForCausalLM.from_pretrained(masters, dtype=dtype).save_pretrained(tmp_path / "as")
    convert_checkpoint(tmp_path / "as", tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "masters-again", to="masters")
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    again = load_file(tmp_path / "masters-again" / "model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {dtype}
    scales = [name for name in packed if name.endswith("weight_scale")]
    assert len(scales) == 14
    for name in scales:
        _, scale = quantize_weight(again[name.removesuffix("_scale")])
        torch.testing.assert_close(scale, packed[name], rtol=1e-5, atol=0)


def test_biases_survive_the_scale_that_autobitlinear_multiplies_them_by(tmp_path, logits):
    config = bt.BitNetConfig(**SIZES, attention_bias=True, quantization_config=ONLINE)
    model = bt.BitNetForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "masters")
    convert_checkpoint(tmp_path / "masters", tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "back", to="masters", dtype=torch.float32)
    masters, packed, back, theirs = logits(
        *((bt.BitNetForCausalLM, tmp_path / name) for name in ("masters", "packed", "back")),
        (HfBitNetForCausalLM, tmp_path / "packed"),
    )
    for name, found in (("packed", packed), ("back", back)):
        assert (found - masters).norm() <= 1e-5 * masters.norm(), name
    assert (theirs - masters).norm() <= 1e-4 * masters.norm()


def test_other_tensors_and_files_are_kept_and_pickles_are_not(masters, tmp_path):
    convert_checkpoint(masters, tmp_path / "packed")
    before = load_file(masters / "model.safetensors")
    after = load_file(tmp_path / "packed" / "model.safetensors")
    for name, tensor in before.items():
        if "_proj" not in name:
            assert torch.equal(tensor, after[name])
    names = {file.name for file in (tmp_path / "packed").iterdir()}
    assert "tokenizer.json" in names
    assert "training_args.bin" not in names


def test_shards_stay_shards(tmp_path, logits):
    bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES)).save_pretrained(
        tmp_path / "masters", max_shard_size="60KB"
    )
    convert_checkpoint(tmp_path / "masters", tmp_path / "packed")
    shards = sorted(file.name for file in (tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 2
    masters, packed = logits(
        *((bt.BitNetForCausalLM, tmp_path / name) for name in ("masters", "packed"))
    )
    assert (packed - masters).norm() <= 1e-5 * masters.norm()


def test_other_architectures_are_packed_too(tmp_path, steady_ids):
    config = LlamaConfig(**SIZES, quantization_config=ONLINE)
    model = LlamaForCausalLM(config)
    replace_linears(model, ONLINE)
    model.save_pretrained(tmp_path / "masters")
    convert_checkpoint(tmp_path / "masters", tmp_path / "packed")
    packed = bt.use_ternary_kernels(LlamaForCausalLM.from_pretrained(tmp_path / "packed"))
    tokens = steady_ids(model, packed, B=1, T=9)
    with torch.inference_mode():
        before, after = model.eval()(tokens).logits, packed(tokens).logits
    assert (after - before).norm() <= 1e-5 * before.norm()


def assert_refused(error, match, source, target, **options):
    siblings = set(target.parent.iterdir())
    with pytest.raises(error, match=match):
        convert_checkpoint(source, target, **options)
    assert not target.exists()
    assert set(target.parent.iterdir()) == siblings, "something partial was left behind"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_masters_with_nan_are_refused_by_name(masters, tmp_path):
    rewrite(masters, lambda tensors: tensors[f"{LAYER}.weight"][3, 5].fill_(float("nan")))
    assert_refused(bt.CheckpointError, f"{LAYER}.*NaN", masters, tmp_path / "packed")


def test_a_missing_tensor_is_refused_by_name(masters, tmp_path):
    rewrite(masters, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    assert_refused(bt.CheckpointError, f"lacks {LAYER}", masters, tmp_path / "packed")


def test_a_truncated_file_is_refused(masters, tmp_path):
    file = masters / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(bt.CheckpointError, "damaged or truncated", masters, tmp_path / "packed")


def test_a_pickled_checkpoint_is_never_read(masters, tmp_path):
    (masters / "model.safetensors").rename(masters / "pytorch_model.bin")
    assert_refused(bt.CheckpointError, "pickled weights", masters, tmp_path / "packed")


def test_a_dense_model_is_not_rounded(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    assert_refused(bt.CheckpointError, "destroys it", tmp_path / "dense", tmp_path / "packed")


def test_packing_what_is_packed_is_refused(masters, tmp_path):
    convert_checkpoint(masters, tmp_path / "packed")
    assert_refused(ValueError, "one that is packed", tmp_path / "packed", tmp_path / "again")


def test_an_unknown_format_is_refused(masters, tmp_path):
    assert_refused(ValueError, "packed, masters, got 'gguf'", masters, tmp_path / "x", to="gguf")


def test_a_disk_error_half_way_leaves_nothing(masters, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("bitnet_triton.models.convert.save_file", fail)
    assert_refused(OSError, "No space", masters, tmp_path / "packed")


def test_a_tensor_that_reads_back_differently_is_caught(masters, tmp_path, monkeypatch):
    def flip_one_code(tensors, file, **options):
        packed = tensors[f"{LAYER}.weight"]
        packed[0, 0] ^= 1 if packed[0, 0] & 3 != 2 else 2  # 0 <-> 1, 2 -> 0: never the invalid 3
        save_file(tensors, file, **options)

    monkeypatch.setattr("bitnet_triton.models.convert.save_file", flip_one_code)
    assert_refused(bt.CheckpointError, "does not read back", masters, tmp_path / "packed")


def test_an_empty_folder_is_a_fine_target(masters, tmp_path):
    target = tmp_path / "packed"
    target.mkdir()
    convert_checkpoint(masters, target)
    assert (target / "model.safetensors").is_file()
    shutil.rmtree(target)
