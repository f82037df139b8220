"""Calls as other packages make them, without these packages."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitNetQuantConfig
from transformers.quantizers.auto import AutoQuantizationConfig

import bitnet_triton as bt
from bitnet_triton.models.fused.layer import FusedDecoderLayer
from bitnet_triton.models.quantizer import in_memory, replace_linears
from bitnet_triton.nn import Int8Head, OutputHead, PackedBitLinear


@pytest.fixture
def enabled():
    bt.enable()
    yield
    bt.disable()


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
def test_lm_eval_hands_the_quantisation_of_the_config_back(arch, checkpoint, enabled):
    folder = checkpoint(arch=arch)
    config = AutoConfig.from_pretrained(folder)  # lm_eval/models/huggingface.py, since 0.4.9
    quantisation = AutoQuantizationConfig.from_dict(config.quantization_config)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantisation, dtype="auto", device_map={"": "cpu"}
        )
    assert count(model, PackedBitLinear) == 14
    assert count(model, FusedDecoderLayer) == 2


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "config"])
def test_our_class_takes_a_quantisation_as_that_of_transformers_does(as_dict, checkpoint):
    given = AutoConfig.from_pretrained(checkpoint()).quantization_config
    given = given if as_dict else BitNetQuantConfig(**given)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), quantization_config=given)
    assert count(model, PackedBitLinear) == 14


def test_another_quantisation_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"`quant_method`: expected 'bitnet', got 'gptq'"):
        bt.BitNetForCausalLM.from_pretrained(
            checkpoint(), quantization_config={"quant_method": "gptq", "bits": 4}
        )


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
def test_trl_takes_the_class_that_the_config_names(arch, checkpoint, enabled):
    folder = checkpoint(arch=arch)
    config = AutoConfig.from_pretrained(folder)  # trl/trainer/utils.py, create_model_from_path
    named = getattr(transformers, config.architectures[0])
    model = named.from_pretrained(folder, device_map=None, dtype="float32")
    assert count(model, PackedBitLinear) == 14
    assert count(model, FusedDecoderLayer) == 2
    assert isinstance(model, bt.BitNetForCausalLM if arch == "bitnet" else named)
    bt.disable()
    with torch.compiler.set_stance("force_eager"):
        assert not count(named.from_pretrained(folder), PackedBitLinear)


def test_a_named_class_follows_the_attention_of_the_checkpoint(checkpoint, tmp_path, enabled):
    own = {"attention": {"mode": "sliding", "window": 4}}
    bt.BitNetForCausalLM.from_pretrained(checkpoint(), **own).save_pretrained(tmp_path)
    model = transformers.BitNetForCausalLM.from_pretrained(tmp_path)
    assert model.attention_plan is not None
    assert type(transformers.BitNetModel.from_pretrained(checkpoint(base=True))) is bt.BitNetModel


def test_subclasses_of_others_stay_what_they_are_while_enabled(checkpoint, enabled):
    class Theirs(transformers.BitNetForCausalLM):
        pass

    model = Theirs.from_pretrained(checkpoint())
    assert type(model) is Theirs
    assert count(model, PackedBitLinear) == 14


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
def test_memory_given_to_an_empty_model_holds_zero_codes(arch, checkpoint, enabled):
    config = AutoConfig.from_pretrained(checkpoint(arch=arch))
    junk = torch.full((1 << 20,), 255, dtype=torch.uint8)
    del junk
    with torch.device("meta"):
        if arch == "bitnet":
            model = bt.BitNetForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
            replace_linears(model, in_memory(config.quantization_config))
    model.to_empty(device="cpu")
    model.init_weights()
    packed = [module for module in model.modules() if isinstance(module, PackedBitLinear)]
    assert len(packed) == 14
    for layer in packed:
        assert not layer.ternary_weight.codes().any()
        assert layer.weight_scale.tolist() == [1.0]


def test_packed_weights_are_counted(checkpoint):
    packed = bt.BitNetForCausalLM.from_pretrained(checkpoint(bias=True))
    masters = bt.BitNetForCausalLM.from_pretrained(checkpoint("online", bias=True))
    for exclude in (False, True):
        expected = masters.num_parameters(exclude_embeddings=exclude)
        assert packed.num_parameters(exclude_embeddings=exclude) == expected
    assert packed.num_parameters(only_trainable=True) == sum(p.numel() for p in packed.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False], ids=["int8", "dense"])
@pytest.mark.parametrize("size", [88, 104])
def test_a_resized_vocabulary_keeps_the_head(
    size, quantised, tied, checkpoint, token_ids, logits, error
):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(tied=tied)).eval()
    if quantised:
        bt.quantize_head(model)
    ids = token_ids(2, 5).clamp_max(87)
    before = logits(model, ids)[..., :88]
    model.resize_token_embeddings(size)
    assert type(model.lm_head) is (Int8Head if quantised else OutputHead)
    after = logits(model, ids)
    assert after.shape[-1] == size
    assert error(after[..., :88], before) < 1e-3
    bt.unquantize_head(model)
    assert type(model.lm_head) is OutputHead
    assert error(after, logits(model, ids)) < 3e-2


def test_a_resized_head_is_not_filled_with_random_numbers_again(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(tied=False))
    model.resize_token_embeddings(104)
    before = model.lm_head.weight.detach().clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, before)
