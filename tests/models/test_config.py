"""The config: rope types, attention, model types, and what is written to config.json."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import BitNetConfig as HfBitNetConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.quantization_config import BitNetQuantConfig

import bitnet_triton as bt

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def rope_checkpoint(checkpoint, rope, format="packed"):
    return checkpoint(format, config=json.dumps({"rope_parameters": ROPES[rope]}))


# 16 is `original_max_position_embeddings`, 64 `max_position_embeddings`
@pytest.mark.parametrize("start", [0, 20, 70])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_types_give_the_logits_of_transformers(
    rope, start, checkpoint, load_theirs, steady_ids, logits, error
):
    folder = rope_checkpoint(checkpoint, rope)
    theirs = load_theirs(folder)
    positions = torch.arange(start, start + 5).unsqueeze(0)
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    ids = steady_ids(theirs, model, position_ids=positions)
    expected = logits(theirs, ids, position_ids=positions)
    assert error(logits(model, ids, position_ids=positions), expected) <= 1e-4


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_each_rope_type_changes_the_logits(rope, checkpoint, logits, token_ids, error):
    ids = token_ids()
    positions = torch.arange(40, 80, 5).expand_as(ids)
    if rope == "dynamic":  # scales only beyond `max_position_embeddings`
        positions = positions + 64
    scaled, plain = (
        bt.BitNetForCausalLM.from_pretrained(rope_checkpoint(checkpoint, name))
        for name in (rope, "default")
    )
    a, b = (logits(model, ids, position_ids=positions) for model in (scaled, plain))
    assert error(a, b) > 5e-3


@pytest.mark.parametrize("rope", ROPES)
def test_rope_parameters_survive_saving(rope, checkpoint, tmp_path):
    config = bt.BitNetConfig.from_pretrained(rope_checkpoint(checkpoint, rope))
    config.save_pretrained(tmp_path)
    again = bt.BitNetConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert ROPES[rope].items() <= again.rope_parameters.items()
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_yarn_frequencies_are_those_of_the_published_code():
    config = bt.BitNetConfig(
        hidden_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=65536,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
        },
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    # ramp linear in the index, as the authors' code and every checkpoint have it, not the paper
    expected = {25: 2.244714171e-2, 30: 8.526843773e-3, 40: 8.817889629e-4}
    assert factor == pytest.approx(1.2772588722, rel=1e-9)
    for i, value in expected.items():
        assert frequencies[i].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("attention", ["full", {"mode": "full"}])
def test_a_checkpoint_with_attention_goes_under_our_model_type(
    attention, checkpoint, tmp_path, steady_ids, logits, error
):
    plain = bt.BitNetForCausalLM.from_pretrained(checkpoint())
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bitnet_triton"
    assert written["attention"] == model.config.attention
    assert written["quantization_config"]["quant_method"] == "bitnet"

    assert type(AutoConfig.from_pretrained(tmp_path)) is bt.BitNetConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is bt.BitNetModel
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is bt.BitNetForCausalLM
    assert again.config.attention == model.config.attention
    ids = steady_ids(model, plain)
    assert torch.equal(logits(again, ids), logits(model, ids))
    # another attention than that of PyTorch: equal but for rounding
    assert error(logits(model, ids), logits(plain, ids)) <= 1e-5


def python(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_transformers_alone_reads_a_plain_checkpoint(checkpoint, tmp_path):
    bt.BitNetForCausalLM.from_pretrained(checkpoint("online")).save_pretrained(tmp_path)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1]); print(type(m).__module__,"
        "torch.load(sys.argv[2])['model.embed_tokens.weight'].equal(m.model.embed_tokens.weight),"
        "'bitnet_triton' in sys.modules)"
    )
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "expected.pt")
    printed = python(script, tmp_path, tmp_path / "expected.pt")
    assert printed == "transformers.models.bitnet.modeling_bitnet True False"


def test_transformers_alone_refuses_a_checkpoint_with_attention(checkpoint, tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention="full")
    model.save_pretrained(tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as error:
        python("import sys, transformers as t; t.AutoConfig.from_pretrained(sys.argv[1])", tmp_path)
    assert "bitnet_triton" in error.value.stderr


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        ("ful", ValueError, r"out of: .*full.*got 'ful'; did you mean 'full'\?"),
        ({"mode": "none of it"}, ValueError, "expected a mode out of: "),
        ({"window": 3}, ValueError, "expected a mode out of: .*got None"),
        ({"mode": "full", "window": 3}, ValueError, "setting of mode 'full' out of: none; got"),
        (3, TypeError, "`attention`: expected a name or a dict, got int"),
        ({"prefill": "full"}, ValueError, "the phases 'prefill' and 'decode', got 'prefill'"),
        (
            {"prefill": ["full"] * 3, "decode": "full"},
            ValueError,
            "expected one mode or 2, one a layer, got 3 for 'prefill'",
        ),
    ],
)
def test_an_unknown_attention_is_refused_with_the_nearest_name(
    attention, error, message, checkpoint
):
    with pytest.raises(error, match=message):
        bt.BitNetConfig(attention=attention, num_hidden_layers=2)
    with pytest.raises(error, match=message):
        bt.BitNetForCausalLM.from_pretrained(checkpoint(), attention=attention)


def test_a_fresh_config_is_trainable_and_none_is_dense():
    assert bt.BitNetConfig().quantization_config["quantization_mode"] == "online"
    dense = bt.BitNetConfig(quantization_config=None)
    assert getattr(dense, "quantization_config", None) is None
    assert "quantization_config" not in dense.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}},
        {"quantization_config": BitNetQuantConfig(linear_class="autobitlinear")},
        {"attention": "full", "quantization_config": None},
        {"hidden_act": "silu", "tie_word_embeddings": True},
    ],
)
def test_a_config_survives_its_own_plain_data_and_its_file(fields, tmp_path):
    config = bt.BitNetConfig(**fields)
    config.save_pretrained(tmp_path)
    for again in (
        bt.BitNetConfig.from_dict(config.to_dict()),
        bt.BitNetConfig.from_dict(config.to_diff_dict()),
        bt.BitNetConfig.from_pretrained(tmp_path),
    ):
        assert again.to_diff_dict() == config.to_diff_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    method = written.get("quantization_config", {}).get("quant_method")
    assert method in (None, "bitnet")


def test_the_name_of_our_quantiser_stays_in_memory(checkpoint):
    config = bt.BitNetForCausalLM.from_pretrained(checkpoint()).config
    assert config.quantization_config.quant_method == "bitnet_triton"
    assert config.quantization_config.to_dict()["quant_method"] == "bitnet"
    assert "bitnet_triton" not in config.to_json_string()


def test_a_config_of_transformers_becomes_ours_with_all_its_fields(checkpoint):
    theirs = HfBitNetConfig.from_pretrained(checkpoint("packed", tied=True, bias=True))
    ours = bt.BitNetConfig.from_hf(theirs)
    assert ours.to_diff_dict() == theirs.to_diff_dict()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"quant_method": "awq"}, ValueError, "`quant_method`: expected 'bitnet', got 'awq'"),
        ({"linear_class": "bitlinear"}, ValueError, "`quant_method`: expected 'bitnet', got None"),
        ("bitnet", TypeError, "`quantization_config`: expected a dict, got str"),
    ],
)
def test_another_quantisation_is_refused_by_the_config(value, error, message):
    with pytest.raises(error, match=message):
        bt.BitNetConfig(quantization_config=value)


def test_an_unknown_linear_class_is_refused():
    config = bt.BitNetConfig(quantization_config={"quant_method": "bitnet", "linear_class": "bit"})
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="linear_class must be either"),
    ):
        bt.BitNetForCausalLM(config)
