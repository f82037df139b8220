"""MergedLinears: one matrix, in whose memory the weights of the linears lie."""

import copy
import weakref

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
        assert layer.weight.data_ptr() == part.packed.data_ptr()


def test_weights_become_parts_and_keep_their_values(linears):
    before = [layer.weight.clone() for layer in linears]
    merged = MergedLinears(*linears)
    assert_merged(merged, linears)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(linears, before))
    assert merged.weight() is merged.weight()


def test_each_part_has_a_storage_of_its_own_that_is_the_part(linears):
    MergedLinears(*linears)
    storages = [layer.weight.untyped_storage() for layer in linears]
    assert len({storage.data_ptr() for storage in storages}) == len(linears)
    assert [s.nbytes() for s in storages] == [layer.weight.numel() for layer in linears]


def test_a_write_into_a_part_is_a_write_into_the_matrix(linears):
    merged = MergedLinears(*linears)
    linears[1].weight.fill_(0b01010101)
    assert not merged.weight().parts()[1].codes().any()
    assert merged.weight().parts()[0].codes().any()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_new_data_of_a_buffer_is_seen(name, count, linears):
    linears = linears[:count]
    merged = MergedLinears(*linears)
    assert merged.is_current()
    for _ in range(3):  # the second may get the memory that the first one had
        for layer in linears:
            buffer = getattr(layer, name)
            other = linear(layer.out_features, scale=torch.rand(()).item())
            before = buffer.clone()
            buffer.data = getattr(other, name)
            assert not torch.equal(buffer, before)
            assert not merged.is_current()
            assert_merged(merged, linears)
            assert merged.is_current()


def test_a_write_into_the_data_of_a_scale_is_seen(linears):
    merged = MergedLinears(*linears)
    for layer in linears:
        layer.weight_scale.data.mul_(2)
        assert_merged(merged, linears)


def test_released_linears_own_their_memory(linears):
    merged = MergedLinears(*linears)
    before = [layer.weight.clone() for layer in linears]
    whole = weakref.ref(merged.weight().packed)
    merged.release()
    del merged
    assert whole() is None
    for layer, weight in zip(linears, before):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.untyped_storage().nbytes() == weight.numel()


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
