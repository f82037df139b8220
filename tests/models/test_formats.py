"""Every checkpoint format: logits of transformers' own class, and saving."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import bitnet_triton as bt
from bitnet_triton.nn import BitLinear, OutputHead, PackedBitLinear

FORMATS = ["bitlinear", "packed", "codes", "online", "dense"]
VARIANTS = [
    *({"format": f} for f in FORMATS),
    *({"format": f, "tied": True} for f in FORMATS),
    *({"format": f, "bias": True, "rms_norm": True} for f in FORMATS[:4]),
    *({"format": f, "shards": 3} for f in FORMATS),
]
BASES = [{"format": f, "base": True} for f in FORMATS]


def name(fields):
    return "-".join(str(v) if k in ("format", "dtype") else k for k, v in fields.items())


def ours(folder, **kwargs):
    return bt.BitNetForCausalLM.from_pretrained(folder, **kwargs)


def assert_same_state(model, other):
    state, expected = other.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("fields", VARIANTS, ids=name)
def test_float32_logits_are_those_of_transformers(
    fields, checkpoint, load_theirs, steady_ids, logits, error
):
    folder = checkpoint(**fields)
    theirs = load_theirs(folder)
    model = ours(folder)
    ids = steady_ids(theirs, model)
    assert error(logits(model, ids), logits(theirs, ids)) <= 1e-4


@pytest.mark.parametrize("fields", BASES, ids=name)
def test_hidden_states_of_the_base_model_are_those_of_transformers(
    fields, checkpoint, load_theirs, steady_ids, logits, error
):
    folder = checkpoint(**fields)
    theirs = load_theirs(folder, AutoModel)
    model = bt.BitNetModel.from_pretrained(folder)
    ids = steady_ids(theirs, model)
    assert error(logits(model, ids), logits(theirs, ids)) <= 1e-4


def float32_oracle(load_theirs, folder, format):
    """transformers' class in float32 on the rounded weights of a bfloat16 checkpoint."""
    if format in ("packed", "codes"):  # their float32 loading leaves weights in bfloat16
        return torch.nn.Module.float(load_theirs(folder))
    return load_theirs(folder, dtype=torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_logits_are_those_of_transformers(
    format, checkpoint, load_theirs, token_ids, logits, error
):
    folder = checkpoint(format, dtype=torch.bfloat16)
    ids = token_ids()
    theirs = logits(load_theirs(folder), ids)
    exact = logits(float32_oracle(load_theirs, folder, format), ids)
    model = ours(folder)
    result = logits(model, ids)

    assert model.dtype == result.dtype == torch.bfloat16
    assert error(result, theirs) <= 2e-2
    # `bitlinear` of transformers rounds activations, their codes and the sums of codes to bfloat16,
    # ours only its input and output: in doubt the float32 oracle is right, not their bfloat16
    assert error(result, exact) <= 2e-2
    own_error = (theirs - exact).abs().max()
    best = exact.topk(2, dim=-1).values
    is_clear = best[..., 0] - best[..., 1] > 2 * own_error
    assert is_clear.float().mean() > 0.2
    assert torch.equal(result.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])


@pytest.mark.parametrize("format", ["bitlinear", "packed", "online"])
def test_the_default_backend_gives_the_same_logits(
    format, checkpoint, load_theirs, steady_ids, logits, error, default_backend
):
    folder = checkpoint(format)
    theirs = load_theirs(folder)
    model = ours(folder)
    ids = steady_ids(theirs, model)
    with torch.no_grad():
        result = model(ids).logits
        one_row = model(ids[:1, :1]).logits
    assert error(result, logits(theirs, ids)) <= 1e-4
    assert error(one_row, result[:1, :1]) <= 1e-4


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("bitlinear", PackedBitLinear),
        ("packed", PackedBitLinear),
        ("codes", PackedBitLinear),
        ("online", BitLinear),
        ("dense", torch.nn.Linear),
    ],
)
def test_the_linears_are_ours_and_the_head_is_not_quantised(format, kind, checkpoint):
    model = ours(checkpoint(format))
    linears = {n: type(m) for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))}
    assert linears.pop("lm_head") is OutputHead
    assert len(linears) == 14
    assert set(linears.values()) == {kind}


@pytest.mark.parametrize("fields", [*VARIANTS, *BASES], ids=name)
def test_saving_reads_back_bit_for_bit(fields, checkpoint, tmp_path):
    model_class = bt.BitNetModel if fields.get("base") else bt.BitNetForCausalLM
    model = model_class.from_pretrained(checkpoint(**fields))
    model.save_pretrained(tmp_path, max_shard_size="30KB" if "shards" in fields else "1GB")
    again = model_class.from_pretrained(tmp_path)

    assert_same_state(model, again)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "shards" in fields


@pytest.mark.parametrize("fields", VARIANTS, ids=name)
def test_transformers_reads_what_we_save(
    fields, checkpoint, load_theirs, tmp_path, logits, token_ids
):
    model = ours(checkpoint(**fields))
    model.save_pretrained(tmp_path, max_shard_size="30KB" if "shards" in fields else "1GB")
    before = load_theirs(checkpoint(**fields))
    after = load_theirs(tmp_path)

    assert AutoConfig.from_pretrained(tmp_path).model_type == "bitnet"
    assert type(after) is type(before)
    ids = token_ids()
    assert torch.equal(logits(after, ids), logits(before, ids))


def test_saved_codes_stay_packed(checkpoint, tmp_path):
    for format in ("bitlinear", "packed", "codes"):
        ours(checkpoint(format)).save_pretrained(tmp_path / format)
        saved = load_file(tmp_path / format / "model.safetensors")
        weight = saved["model.layers.1.mlp.down_proj.weight"]
        assert (weight.dtype, weight.shape) == (torch.uint8, (16, 100))


def test_saving_over_the_checkpoint_that_was_loaded_keeps_it(checkpoint, tmp_path):
    ours(checkpoint()).save_pretrained(tmp_path)
    model = ours(tmp_path)
    model.save_pretrained(tmp_path)  # the weights are still mapped from the file that is replaced
    assert_same_state(ours(checkpoint()), ours(tmp_path))
    assert_same_state(ours(checkpoint()), model)


@pytest.mark.parametrize("format", FORMATS)
def test_base_and_causal_checkpoints_load_into_each_other(format, checkpoint, token_ids, logits):
    base = bt.BitNetModel.from_pretrained(checkpoint(format))
    whole = ours(checkpoint(format, base=True, tied=True))
    tied = ours(checkpoint(format, tied=True))
    ids = token_ids()
    assert_same_state(base, ours(checkpoint(format)).model)
    assert torch.equal(logits(whole, ids), logits(tied, ids))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_argument_casts_all_but_codes_and_scales(format, dtype, checkpoint, token_ids):
    packed = ours(checkpoint(format)).state_dict()
    for model in (
        ours(checkpoint(format), dtype=dtype),
        ours(checkpoint(format)).to(dtype),
        ours(checkpoint(format)).half() if dtype == torch.float16 else ours(checkpoint(format)),
    ):
        for key, tensor in model.state_dict().items():
            is_code = tensor.dtype == torch.uint8 or key.endswith("weight_scale")
            assert tensor.dtype == (packed[key].dtype if is_code else model.dtype), key
            assert not is_code or torch.equal(tensor, packed[key]), key
        with torch.no_grad():
            assert model(token_ids(1, 3)).logits.dtype == model.dtype
