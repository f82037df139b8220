"""MergedLinears: one matrix, of which the weights of the linears are views."""

import copy

import pytest
import torch

from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.nn import MergedLinears, PackedBitLinear
from bitnet_triton.testing import random_codes


def linear(N, K=16, scale=0.5, divides=False):
    layer = PackedBitLinear(K, N, scale_divides=divides)
    weight = TernaryWeight.from_codes(random_codes(N, K), scale)
    layer.weight, layer.weight_scale = weight.packed, weight.scale
    return layer


@pytest.fixture
def linears():
    return [linear(24), linear(8, scale=0.25, divides=True), linear(4, scale=2.0)]


def assert_merged(merged, linears):
    weight = merged.weight()
    for part, layer in zip(weight.parts(), linears):
        assert torch.equal(part.codes(), layer.ternary_weight.codes())
        assert torch.equal(part.scale, layer.ternary_weight.scale)
        if len(linears) > 1:
            assert layer.weight.untyped_storage().data_ptr() == weight.packed.data_ptr()


def test_weights_become_views_and_keep_their_values(linears):
    before = [layer.weight.clone() for layer in linears]
    merged = MergedLinears(*linears)
    assert_merged(merged, linears)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(linears, before))
    assert merged.weight() is merged.weight()


def test_one_linear_keeps_its_own_buffer():
    layer = linear(24)
    weight = layer.weight
    merged = MergedLinears(layer)
    assert layer.weight is weight
    assert merged.weight().packed.data_ptr() == weight.data_ptr()


def test_a_state_dict_that_is_loaded_is_seen(linears):
    merged = MergedLinears(*linears)
    others = [linear(layer.out_features, scale=3.0) for layer in linears]
    for layer, other in zip(linears, others):
        layer.load_state_dict(other.state_dict())
    assert_merged(merged, linears)
    for layer, other in zip(linears, others):
        layer.load_state_dict(other.state_dict(), assign=True)
    assert_merged(merged, linears)
    linears[1].weight_scale = torch.tensor([7.0])
    assert_merged(merged, linears)


def test_casts_and_moves_are_seen(linears):
    merged = MergedLinears(*linears)
    before = merged.weight()
    for layer in linears:
        layer.bfloat16()
    assert merged.weight() is before
    for layer in linears:
        layer.to("meta")
    assert merged.weight().device.type == "meta"


def test_a_copy_is_merged_by_itself(linears):
    merged, copies = copy.deepcopy((MergedLinears(*linears), linears))
    assert_merged(merged, copies)
    assert copies[0].weight.data_ptr() != linears[0].weight.data_ptr()


def test_weights_merged_in_inference_mode_can_be_differentiated_through(linears):
    merged = MergedLinears(*linears)
    linears[0].weight = linears[0].weight.clone()
    with torch.inference_mode():
        merged.weight()
    x = torch.randn(2, 16, requires_grad=True)
    linears[0](x).sum().backward()
    assert x.grad.any()
