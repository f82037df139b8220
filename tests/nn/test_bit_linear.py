"""BitLinear and PackedBitLinear as modules: state, casts, copies."""

import copy

import pytest
import torch
from torch import nn

import bitnet_triton as bt
from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.nn import BitLinear, PackedBitLinear


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch):
    monkeypatch.setenv("BITNET_TRITON_BACKEND", "reference")


def dense(N=12, K=20, bias=True, **kwargs):
    return nn.Linear(K, N, bias, **kwargs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divides", [False, True])
def test_packing_keeps_the_function_of_the_trainable_layer(divides, bias):
    linear = dense(bias=bias)
    x = torch.randn(3, 5, 20)
    expected = BitLinear.from_linear(linear)(x)
    packed = PackedBitLinear.from_linear(linear, scale_divides=divides)
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-6)
    assert packed.weight.shape == (3, 20)


@pytest.mark.parametrize("divides", [False, True])
def test_the_scale_has_the_meaning_of_the_checkpoint(divides):
    linear = dense()
    beta = linear.weight.abs().mean()
    packed = PackedBitLinear.from_linear(linear, scale_divides=divides)
    torch.testing.assert_close(packed.weight_scale, (1 / beta if divides else beta).reshape(1))
    torch.testing.assert_close(packed.ternary_weight.scale, beta.reshape(1))


def test_from_linear_shares_the_parameters():
    linear = dense()
    layer = BitLinear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_leaves_codes_and_scale(dtype):
    layer = PackedBitLinear.from_linear(dense(), scale_divides=True)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.weight, weight)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale)
    layer.float()
    assert torch.equal(layer.weight_scale, scale)


def test_moving_moves_the_scale():
    layer = PackedBitLinear.from_linear(dense(), scale_divides=True).to("meta", torch.float16)
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("divides", [False, True])
def test_a_loaded_state_is_used_at_once(divides, assign):
    x = torch.randn(2, 20)
    source = PackedBitLinear.from_linear(dense(), scale_divides=divides)
    layer = PackedBitLinear.from_linear(dense(), scale_divides=divides)
    before = layer(x)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(layer(x), source(x))
    assert not torch.equal(layer(x), before)
    layer.weight_scale.mul_(2)
    assert not torch.equal(layer(x), source(x)) or assign  # assigned tensors are those of source


def test_a_scale_of_another_dtype_is_understood():
    layer = PackedBitLinear.from_linear(dense(bias=False), scale_divides=True)
    x = torch.randn(2, 20)
    state = layer.state_dict()
    state["weight_scale"] = state["weight_scale"].bfloat16()
    layer.load_state_dict(state, assign=True)
    assert layer.weight_scale.dtype == torch.bfloat16
    exact = TernaryWeight(layer.weight, 1 / layer.weight_scale.float())
    assert torch.equal(layer(x), bt.kernels.ternary_linear(x, exact))


def test_a_copy_is_independent():
    layer = PackedBitLinear.from_linear(dense(), scale_divides=False)
    x = torch.randn(2, 20)
    before = layer(x)
    copy.deepcopy(layer).weight.fill_(0)
    assert torch.equal(layer(x), before)


def test_a_new_packed_layer_is_valid_and_zero():
    layer = PackedBitLinear(8, 4, scale_divides=False)
    assert not TernaryWeight.from_checkpoint(layer.weight, 1.0).codes().any()
    assert not layer(torch.randn(2, 8)).any()
    assert [name for name, _ in layer.named_parameters()] == []


@pytest.mark.parametrize("kind", [BitLinear, PackedBitLinear])
def test_the_norm_comes_first(kind):
    norm = nn.RMSNorm(20)
    nn.init.normal_(norm.weight)
    linear, x = dense(), torch.randn(2, 20)
    settings = {"scale_divides": True} if kind is PackedBitLinear else {}
    plain, normed = (
        kind.from_linear(linear, **settings),
        kind.from_linear(linear, rms_norm=norm, **settings),
    )
    assert torch.equal(normed(x), plain(norm(x)))
    assert "rms_norm.weight" in normed.state_dict()


def test_binary_levels_reach_the_op():
    layer = BitLinear(20, 12, levels="binary")
    x = torch.randn(2, 20)
    expected = bt.kernels.bit_linear(x, layer.weight, layer.bias, levels="binary")
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), bt.kernels.bit_linear(x, layer.weight, layer.bias))


def test_a_width_that_does_not_pack_is_refused():
    with pytest.raises(ValueError, match="`out_features`: expected a multiple of 4, got 10"):
        PackedBitLinear.from_linear(dense(N=10), scale_divides=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_masters_that_are_not_finite_are_not_packed(value):
    linear = dense()
    linear.weight.data[3, 4] = value
    with pytest.raises(ValueError, match="`weight`: expected finite values"):
        PackedBitLinear.from_linear(linear, scale_divides=False)


def test_the_layers_describe_themselves():
    assert "levels=ternary" in repr(BitLinear(8, 4))
    packed = repr(PackedBitLinear(8, 4, True, scale_divides=True))
    assert "in_features=8, out_features=4, bias=True, scale_divides=True" in packed
