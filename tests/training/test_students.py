"""A dense model becomes a ternary one with all that it has, or is refused by name."""

import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

import bitnet_triton as bt
from bitnet_triton.kernels import quantize_weight
from bitnet_triton.nn import BitLinear
from bitnet_triton.training.students import (
    layer_objection,
    load_teacher,
    make_student,
    read_dense,
    read_teacher,
)

SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 7000.0, "factor": 2.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, hidden_act="gelu")),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN)),
}


def dense(name):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # biases and norms are born as zeros and ones
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def rows():
    ids = torch.arange(60).view(2, 30) + 3
    return [{"input_ids": row[None], "position_ids": torch.arange(30)[None]} for row in ids]


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_are_taken_over_and_new_norms_keep_sizes(name):
    teacher = dense(name)
    student = make_student(teacher, rows())
    assert all(isinstance(layer.mlp.down_proj, BitLinear) for layer in student.model.layers)
    found = dict(student.named_parameters())
    for key, value in teacher.named_parameters():
        assert torch.equal(found.pop(key), value), key
    biases = {key for key in found if key.endswith("o_proj.bias")}
    assert len(biases) == (2 if name == "qwen2" else 0)
    assert not any(found[key].any() for key in biases)
    norms = {key: found[key] for key in set(found) - biases}
    assert len(norms) == 4
    inputs = {}
    for index, layer in enumerate(teacher.model.layers):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(linear).register_forward_pre_hook(
                lambda m, x, key=(index, linear): inputs.setdefault(key, []).append(x[0].double())
            )
    with torch.no_grad():
        for row in rows():
            teacher(**row)
    for (index, linear), seen in inputs.items():
        norm = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}
        weight = norms[f"model.layers.{index}.{norm[linear]}.weight"]
        size = torch.stack(seen).square().mean().sqrt()
        torch.testing.assert_close(weight.double(), size.expand_as(weight), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_without_rounding_and_new_norms_it_computes_what_the_dense_model_does(name, monkeypatch):
    """All that a BitNet layer changes is left out: what remains is the dense model's."""
    teacher = dense(name)
    student = make_student(teacher, rows())
    for layer in student.model.layers:
        layer.self_attn.attn_sub_norm = layer.mlp.ffn_sub_norm = torch.nn.Identity()
    plain = lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias)  # noqa: E731
    monkeypatch.setattr(BitLinear, "forward", plain)
    row = rows()[0]
    with torch.no_grad():
        ours, theirs = student.eval()(**row).logits, teacher(**row).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def refused(kind=LlamaConfig, **changed):
    return layer_objection(kind(**{**SIZES, **changed}))


def test_what_a_bitnet_layer_cannot_express_is_named():
    assert refused() is None
    assert "norms of their own" in refused(Qwen3Config)
    assert "MLP has biases" in refused(mlp_bias=True)
    assert "got sliding_attention" in refused(
        Qwen2Config, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    assert "got a window of 16" in refused(MistralConfig, sliding_window=16)
    assert "expected heads that are as wide" in refused(head_dim=16)
    assert "`intermediate_size` to be a multiple of 4 to pack, got 50" in refused(
        intermediate_size=50
    )
    assert "a share of 0.5" in refused(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }
    )
    assert "ternary already" in layer_objection(bt.BitNetConfig(**SIZES))
    assert "quantised already" in refused(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "1bitLLM" in refused(weight_bits=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of a dense model and of one whose tokens are others."""
    folder = tmp_path_factory.mktemp("dense")
    dense("llama").save_pretrained(folder / "one")
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(folder / "one")
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 4096})).save_pretrained(folder / "two")
    AutoTokenizer.from_pretrained(bt.TINY_MODEL).save_pretrained(folder / "two")
    return folder


def test_folders_that_do_not_fit_are_named(folders, tmp_path):
    one, two = (str(folders / name) for name in ("one", "two"))
    assert read_dense(one).hidden_size == 32
    assert read_teacher(one, one).hidden_size == 32
    with pytest.raises(ValueError, match=r"`teacher`: expected the vocabulary .* 1024 .* 4096"):
        read_teacher(two, one)
    with pytest.raises(
        ValueError, match=r"`model`: .*cannot become a ternary model: it is ternary"
    ):
        read_dense(str(bt.RECALL_MODEL))
    dense("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model`: .* has no tokenizer to read"):
        read_dense(str(tmp_path))
    AutoTokenizer.from_pretrained(bt.TINY_MODEL).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="tokenizer has token 4095, its embeddings end before 1024"
    ):
        read_dense(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="families llama, mistral, qwen2, got 'gpt2'"):
        read_dense(str(tmp_path))


def test_a_student_is_saved_and_loaded_like_any_ternary_model(folders, tmp_path):
    student = make_student(load_teacher(str(folders / "one"), torch.float32), rows())
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bitnet"
    loaded = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.hidden_act == "silu"
    for (name, ours), theirs in zip(student.named_parameters(), loaded.parameters()):
        assert torch.equal(ours, theirs), name
    codes, _ = quantize_weight(loaded.model.layers[0].mlp.up_proj.weight)
    assert set(codes.unique().tolist()) == {-1, 0, 1}
