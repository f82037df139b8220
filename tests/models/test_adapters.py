"""merge_adapters: LoRA in ternary masters and packed weights, with what that changes measured."""

import logging

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.models import adapters
from bitnet_triton.nn import BitLinear, PackedBitLinear

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer


@pytest.fixture
def adapted(checkpoint):
    """A function that gives q and v adapters whose products have values of this size."""

    def adapt(size, targets=("q_proj", "v_proj"), format="online", bias=False, **kwargs):
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint(format, bias=bias))
        config = peft.LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.5, **kwargs)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.ndim > 1:  # DoRA's magnitudes stay
                torch.nn.init.normal_(parameter, std=size)
        return model

    return adapt


def changed_by_hand(model):
    """Shares of changed codes by the formulas of the paper, in float64."""

    def codes(weight):
        return (weight / weight.abs().mean()).round().clamp(-1, 1)

    shares = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = (part["default"].weight.double() for part in (module.lora_A, module.lora_B))
            weight = module.base_layer.weight.double()
            scaling = module.scaling["default"]
            shares[name] = (codes(weight) != codes(weight + scaling * b @ a)).double().mean().item()
    return shares


def test_what_changes_is_measured_and_told(adapted, token_ids, logits, caplog):
    model, ids = adapted(0.1).train(), token_ids(B=2)
    shares = changed_by_hand(model)
    assert len(shares) == 4
    before = logits(model.eval(), ids)
    model.train()
    with caplog.at_level(logging.WARNING, logger="bitnet_triton"):
        done = bt.merge_adapters(model, input_ids=ids)
    assert type(done.model) is bt.BitNetForCausalLM
    assert not any("lora" in name for name, _ in done.model.named_modules())
    assert done.model.training  # dropout was off for the measurement alone
    after = logits(done.model.eval(), ids)
    expected = ((after - before).norm() / before.norm()).item()
    assert expected > 1e-3
    assert done.logits_change == pytest.approx(expected, rel=1e-3)
    assert done.changed_codes.keys() == shares.keys()
    for name, share in shares.items():
        assert done.changed_codes[name] == pytest.approx(share, abs=2e-3), name
        assert share > 0.01
    (told,) = [r.getMessage() for r in caplog.records if "adapters were merged" in r.getMessage()]
    assert f"logits changed by {100 * expected:.2g} %" in told
    assert max(shares, key=shares.get) in told


@pytest.mark.parametrize("format", ["online", "packed", "bitlinear"])
def test_adapters_of_zeros_change_nothing(format, adapted):
    done = bt.merge_adapters(adapted(0.0, format=format))
    assert done.logits_change == 0
    assert set(done.changed_codes.values()) == {0}


def test_packed_weights_become_the_nearest_packed_ones(adapted, logits, caplog, error, tmp_path):
    ids = torch.randint(3, 90, (2, 9))
    model = adapted(0.2, targets=["q_proj", "lm_head"], format="bitlinear", bias=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base, former = layer.base_layer, layer.base_layer.ternary_weight
    delta = layer.get_delta_weight("default").detach()
    head = model.base_model.model.lm_head
    dense_head = head.base_layer.weight + head.get_delta_weight("default")
    before = logits(model.eval(), ids)
    with caplog.at_level(logging.WARNING, logger="bitnet_triton"):
        done = bt.merge_adapters(model, input_ids=ids)
    assert "adapters were merged into ternary weights" in caplog.text
    merged = done.model.model.layers[0].self_attn.q_proj
    assert merged is base
    codes, scale = merged.ternary_weight.codes(), merged.ternary_weight.scale
    wanted = former.codes() * former.scale + delta
    assert error(codes * scale, wanted) < error(former.codes() * former.scale, wanted) - 1e-2
    assert torch.equal(codes, (wanted / scale).round().clamp(-1, 1).to(torch.int8))
    assert error(scale, ((wanted * codes).sum() / codes.count_nonzero()).view(1)) < 1e-6
    assert torch.equal(done.model.lm_head.weight, dense_head)
    share = (codes != former.codes()).float().mean().item()
    assert done.changed_codes["model.layers.0.self_attn.q_proj"] == pytest.approx(share)
    assert share > 0.01
    after = logits(done.model, ids)
    change = ((after - before).norm() / before.norm()).item()
    assert done.logits_change == pytest.approx(change, rel=0.02)  # fused and not
    done.model.save_pretrained(tmp_path)
    assert torch.equal(logits(bt.BitNetForCausalLM.from_pretrained(tmp_path), ids), after)


@pytest.mark.parametrize("divides", [True, False])
def test_a_merge_keeps_the_bias(divides, error):
    layer = PackedBitLinear.from_linear(torch.nn.Linear(64, 32), scale_divides=divides)
    model = torch.nn.Sequential(layer, torch.nn.PReLU())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    adapter = model.base_model.model[0]
    torch.nn.init.normal_(adapter.lora_B["default"].weight, std=0.1)
    former = layer(torch.zeros(1, 64))
    scale = layer.weight_scale.clone()
    adapters._replace_weight(layer, adapters._merged_weight(adapter))
    assert not torch.equal(layer.weight_scale, scale)
    assert not adapter.merged
    assert error(layer(torch.zeros(1, 64)), former) < 1e-6


def test_dora_is_merged_too(adapted):
    model = adapted(0.1, format="packed", use_dora=True)
    assert 0 < bt.merge_adapters(model).logits_change < 1


def test_what_cannot_be_merged_is_refused(adapted, checkpoint):
    with pytest.raises(TypeError, match=r"expected a peft\.PeftModel, got BitNetForCausalLM"):
        bt.merge_adapters(bt.BitNetForCausalLM.from_pretrained(checkpoint("online")))
    with pytest.raises(ValueError, match="expected adapters beside BitLinear layers"):
        bt.merge_adapters(adapted(0.1, targets=["lm_head"]))
    merged = adapted(0.1)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj.*unmerge_adapter\(\) first"):
        bt.merge_adapters(merged)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        bt.merge_adapters(BitLinear(4, 4))
