"""peft's LoRA beside packed weights: gradients, memory, state, and what stays as it is."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitnet_triton as bt
from bitnet_triton.kernels import quantize_activations
from bitnet_triton.models.fused import fusion
from bitnet_triton.nn import PackedBitLinear

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = torch.tensor([[1, 5, 23, 71, 8, 40, 12, 66, 31, 7, 90, 55]])


def config(targets=ALL, **kwargs):
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **kwargs)


def randomised(model, std=0.1):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=std)
    return model


def gradients(model):
    model.zero_grad()
    model.train()(TEXT, labels=TEXT).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class Unpacked(nn.Module):
    """The product with the unpacked matrix, in plain PyTorch, straight through the quantiser."""

    def __init__(self, packed):
        super().__init__()
        weight = packed.ternary_weight
        self.register_buffer("weight", weight.codes() * weight.scale)

    def forward(self, x):
        with torch.no_grad():
            codes, scale = quantize_activations(x.float())
            self.clear = 0.5 - (x / scale - codes).abs().max()  # of the code nearest to a tie
            error = codes * scale - x
        return (x + error) @ self.weight.to(x.dtype).t()


def unpacked(model):
    """The same peft model with unpacked matrices below its adapters."""
    model = copy.deepcopy(bt.unfuse(model))
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, PackedBitLinear):
                setattr(module, name, Unpacked(child))
    return model


def adapted_layer(packed, **kwargs):
    # peft looks for a device among parameters, and a packed layer has none
    model = nn.Sequential(packed, nn.PReLU())
    config = peft.LoraConfig(r=4, target_modules=["0"], **kwargs)
    return peft.get_peft_model(model, config).base_model.model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_layer_are_those_through_the_unpacked_matrix(dtype, error):
    K, N = 60, 24
    layer = adapted_layer(PackedBitLinear.from_linear(nn.Linear(K, N, bias=False)))
    randomised(layer, std=1.0).to(dtype)
    x, dy = torch.randn(2, 7, K), torch.randn(2, 7, N)
    results = []
    for each, kind in ((layer, dtype), (unpacked(layer), torch.float64)):
        each.to(kind)
        inputs = x.to(dtype).to(kind, copy=True).requires_grad_()
        y = each(inputs)
        y.backward(dy.to(dtype).to(kind))
        grads = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        assert len(grads) == 2
        results.append({"y": y.detach(), "dx": inputs.grad, **grads})
    limit = 2e-6 if dtype is torch.float32 else 8e-3
    for name, exact in results[1].items():
        assert error(results[0][name], exact) < limit, name


@pytest.mark.parametrize("arch", ["bitnet", "llama"])
@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_of_a_model_are_those_through_unpacked_matrices(arch, fuse, checkpoint, error):
    folder = checkpoint("packed", arch=arch)
    if arch == "bitnet":
        model = bt.BitNetForCausalLM.from_pretrained(folder, fuse=fuse)
    else:
        from transformers import AutoModelForCausalLM

        model = bt.use_ternary_kernels(AutoModelForCausalLM.from_pretrained(folder), fuse=fuse)
    model = peft.get_peft_model(model, config("all-linear"))
    clear = 0
    while clear < 4e-5:  # nearer to a tie rounding may choose the other code: draw again
        reference = unpacked(randomised(model))
        expected = gradients(reference)
        clear = min(m.clear for m in reference.modules() if isinstance(m, Unpacked))
    found = gradients(model)
    assert len(expected) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert error(found[name], gradient) < 1e-5, name


class LargestFloats(TorchDispatchMode):
    """Notes how many values the largest float tensor has that any operation makes."""

    def __init__(self, model):
        super().__init__()
        self.most, self.known = 0, {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            if is_float and value.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, value.numel())
        return out


def test_no_step_makes_a_float_matrix_and_the_base_stays_as_it_is(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(
        checkpoint("bitlinear", config='{"hidden_size": 128, "intermediate_size": 128}')
    )
    model = randomised(peft.get_peft_model(model, config(ALL)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with LargestFloats(model) as floats:
        gradients(model)
        optimizer.step()
    assert 0 < floats.most < 64 * 128  # keys: the smallest matrix
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_saved_and_loaded_adapters_give_the_same(checkpoint, tmp_path):
    folder = checkpoint("packed")
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    options = {"use_rslora": True, "modules_to_save": ["lm_head"]}
    model = randomised(
        peft.get_peft_model(model, config(["q_proj", "down_proj"], **options))
    ).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = peft.PeftModel.from_pretrained(bt.BitNetForCausalLM.from_pretrained(folder), tmp_path)
    assert again.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 4.0}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(TEXT).logits, model(TEXT).logits)


def test_transformers_own_adapter_methods_take_packed_models(checkpoint, tmp_path):
    folder = checkpoint("packed")
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    base = model(TEXT).logits
    model.add_adapter(config(["v_proj"], init_lora_weights=False), "mine")
    adapted = model(TEXT).logits
    assert not torch.allclose(adapted, base)
    model.save_pretrained(tmp_path)
    again = bt.BitNetForCausalLM.from_pretrained(folder)
    again.load_adapter(str(tmp_path), "mine")
    assert torch.equal(again(TEXT).logits, adapted)


def test_gradient_checkpointing_and_kbit_preparation_change_no_gradient(checkpoint):
    def adapted(prepare):
        torch.manual_seed(0)
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
        if prepare:
            model = peft.prepare_model_for_kbit_training(model)
        model = peft.get_peft_model(model, config(["q_proj", "up_proj"]))
        if prepare:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return randomised(model)

    expected = gradients(adapted(False))
    for name, gradient in gradients(adapted(True)).items():
        assert torch.equal(gradient, expected[name]), name


def test_dora_is_that_of_the_unpacked_matrix(error):
    K, N = 60, 24
    packed = PackedBitLinear.from_linear(nn.Linear(K, N, bias=False))
    weight = packed.ternary_weight.codes() * packed.ternary_weight.scale
    layer, x = adapted_layer(packed, use_dora=True), torch.randn(5, K)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert error(magnitude, weight.norm(dim=1)) < 2e-6
    randomised(layer, std=0.5)
    delta = (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    factor = magnitude / (weight + delta).norm(dim=1)
    expected = factor * (packed(x) + x @ delta.t())
    assert error(layer(x), expected) < 1e-5


def test_dora_beside_a_scaled_bias_is_refused():
    with pytest.raises(NotImplementedError, match="DoRA beside a packed `autobitlinear` with a"):
        adapted_layer(PackedBitLinear.from_linear(nn.Linear(8, 4)), use_dora=True)


def test_peft_cannot_merge_into_packed_weights_and_leaves_them_alone(checkpoint):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    model = randomised(peft.get_peft_model(model, config())).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(TEXT).logits
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="must match the size"):
            model.merge_adapter(safe_merge=safe)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model(TEXT).logits, expected)


def attach(model):
    model.add_adapter("late", config(["v_proj", "up_proj"]))
    model.set_adapter("late")
    randomised(model).eval()


# what happens to adapters in the middle of a text
IN_BETWEEN = {
    "attached": attach,
    "switched": lambda model: model.set_adapter("other"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "trained": lambda model: randomised(model, std=0.2),
    "taken off": lambda model: model.unload(),
}


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("change", IN_BETWEEN)
def test_decode_steps_see_what_happens_to_adapters(change, checkpoint, token_ids, error):
    ids, logits = token_ids(1, 5), {}
    for fuse in (False, True):
        torch.manual_seed(0)
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"), fuse=fuse)
        base, logits[fuse] = model, []
        with torch.inference_mode():
            cache = model(ids, use_cache=True).past_key_values
            for i in range(12):
                if i == 4:  # the base alone was recorded
                    assert (not fuse) or base.model.decode_steps.recording is not None
                    model = peft.get_peft_model(model, config(["q_proj", "down_proj"]))
                    model.add_adapter("other", config(["q_proj", "gate_proj"]))
                    randomised(model).eval()
                if i == 8:
                    before = logits[fuse][-1]
                    IN_BETWEEN[change](model)
                out = base(torch.tensor([[3 + i]]), past_key_values=cache)
                logits[fuse].append(out.logits)
        assert not torch.allclose(logits[fuse][-1], before)
    for found, expected in zip(logits[True], logits[False]):
        assert error(found, expected) < 2e-2


@pytest.mark.usefixtures("default_backend")
def test_generation_with_adapters_is_that_of_unfused_layers(checkpoint, log):
    folder, written = checkpoint("packed"), {}
    fusion._tell_once.cache_clear()
    for fuse in (True, False):
        torch.manual_seed(0)
        model = bt.BitNetForCausalLM.from_pretrained(folder, fuse=fuse)
        model = randomised(peft.get_peft_model(model, config())).eval()
        kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        written[fuse] = model.generate(input_ids=TEXT, **kwargs)
        with model.disable_adapter():
            written[fuse, "base"] = model.generate(input_ids=TEXT, **kwargs)
    assert torch.equal(written[True], written[False])
    assert torch.equal(written[True, "base"], written[False, "base"])
    assert not torch.equal(written[True], written[True, "base"])
    (line,) = log()
    assert "self_attn.q_proj: it has adapters" in line


@pytest.mark.usefixtures("default_backend")
def test_disabled_adapters_leave_the_recorded_steps_of_the_base(checkpoint, token_ids):
    base = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    plain = copy.deepcopy(base)
    model = randomised(peft.get_peft_model(base, config())).eval()

    def step(one, cache):
        with torch.inference_mode():
            out = one(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
        return out.logits

    def prompt(one):
        with torch.inference_mode():
            return one(TEXT, use_cache=True).past_key_values

    with model.disable_adapter():
        cache, wanted = prompt(base), prompt(plain)
        for _ in range(3):
            assert torch.equal(step(base, cache), step(plain, wanted))
        assert base.model.decode_steps.recording is not None
    adapted = step(base, cache)
    assert not torch.allclose(adapted, step(plain, wanted), atol=1e-3)
    assert base.model.decode_steps.recording is None
    with model.disable_adapter():
        for _ in range(3):
            step(base, cache)
        assert base.model.decode_steps.recording is not None


def test_a_graph_of_disabled_adapters_is_left_when_they_are_enabled(checkpoint, error):
    base = bt.BitNetForCausalLM.from_pretrained(checkpoint("packed"))
    model = randomised(peft.get_peft_model(base, config(["up_proj"])), std=0.5).eval()
    compiled = torch.compile(base, backend="eager")
    with torch.no_grad():
        expected = model(TEXT, use_cache=False).logits
        with model.disable_adapter():
            without = model(TEXT, use_cache=False).logits
            assert error(compiled(TEXT, use_cache=False).logits, without) < 2e-2
        assert error(without, expected) > 5e-2
        assert error(compiled(TEXT, use_cache=False).logits, expected) < 2e-2
    torch.compiler.reset()
