"""A fused and an unfused model part only where an activation code lies at a rounding tie.

Both compute an activation to float32 rounding, in other orders of summation. Where that lies on
both sides of a tie, the int8 codes differ by one, and from there on everything differs by the
effect of a code. With the codes of one model in the other they are equal to float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet_triton as bt
from bitnet_triton.kernels import quantize_activations
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM
from bitnet_triton.models.fused.fusion import Fusion
from bitnet_triton.nn import PackedBitLinear

pytestmark = pytest.mark.usefixtures("default_backend")

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# one of the linears that share an input, in the order in which a layer runs
OPERATIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
# how far from a tie a code may differ, in codes: 127 steps of float32 rounding through a norm
MOST = 5e-4


@dataclass
class Codes:
    """Codes of all operations in order: inputs [M K] of one model, and what the other one makes."""

    inputs: list[Tensor]
    forced: bool
    found: list[Tensor] = field(default_factory=list)

    def take(self, quantized):
        """Note the codes of the fused model; return them, or those of the other one instead."""
        codes, scale, sums = quantized
        at = len(self.found)
        self.found.append(codes.clone())
        if self.forced:
            codes = quantize_activations(self.inputs[at])[0].view_as(codes)
            sums = codes.sum(-1, dtype=torch.int32)
        return codes, scale, sums

    def flips(self) -> list[Tensor]:
        """Return for each operation how far from a tie, in float64, codes that differ lie."""
        distances = []
        for x, codes in zip(self.inputs, self.found, strict=True):
            exact = x.double() * (127 / x.double().abs().amax(-1, keepdim=True))
            distance = (exact - exact.floor() - 0.5).abs()
            step = codes.int() - quantize_activations(x)[0].view_as(codes).int()
            distances.append(distance.view_as(step)[step != 0])
        return distances


def unfused(model, ids):
    """Return logits, and the inputs of all operations in order."""
    seen = []
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, 1).clone())
        )
        for layer in model.model.layers
        for name in OPERATIONS
    ]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def fused(model, ids, codes, monkeypatch):
    """Return logits of the fused model, with what ``codes`` notes or replaces."""
    chosen = Fusion.launchers

    def launchers(self, *args):
        run = chosen(self, *args)
        assert run is not None
        quantizers = ("norm_quantize", "quantize", "relu2", "silu")

        def noted(quantize):
            return lambda *a: codes.take(quantize(*a))

        return run._replace(**{name: noted(getattr(run, name)) for name in quantizers})

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Fusion, "launchers", launchers)
        return bt.fuse(model)(ids, use_cache=False).logits


@pytest.fixture(params=["bitnet", "llama", "embedded"])
def model(request):
    if request.param == "embedded":
        return BitNetForCausalLM.from_pretrained(
            bt.TINY_MODEL, dtype=torch.float32, fuse=False
        ).eval()
    kinds = {
        "bitnet": (BitNetForCausalLM, BitNetConfig),
        "llama": (LlamaForCausalLM, LlamaConfig),
    }
    model_class, config_class = kinds[request.param]
    model = model_class(config_class(**SIZES))
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj"):
            packed = PackedBitLinear(linear.in_features, linear.out_features, scale_divides=False)
            codes = torch.randint(0, 3, (4, *packed.weight.shape))
            packed.weight.copy_(sum(part << (2 * i) for i, part in enumerate(codes)))
            packed.weight_scale.fill_(linear.in_features**-0.5)
            model.set_submodule(name, packed)
    return model.eval()


def test_codes_differ_at_ties_only_and_nothing_else_does(model, error, monkeypatch):
    ids = torch.randint(3, model.config.vocab_size, (1, 384))
    expected, inputs = unfused(model, ids)

    same = Codes(inputs, forced=True)
    with_same_codes = fused(model, ids, same, monkeypatch)
    own = Codes(inputs, forced=False)
    with_own_codes = fused(model, ids, own, monkeypatch)

    flips, first = same.flips(), [len(codes) > 0 for codes in own.flips()]
    assert error(with_same_codes, expected) < 2e-6
    assert all(distance < MOST for distances in flips for distance in distances)
    # what one flip changes, others follow: only the first one is alone
    at_ties = [len(distances) > 0 for distances in flips]
    assert any(first) == any(at_ties)
    assert not any(first) or first.index(True) == at_ties.index(True)
    assert (error(with_own_codes, expected) < 2e-6) == (not any(first))
