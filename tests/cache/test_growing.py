"""A cache layer that grows in place, against transformers' own."""

import copy

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from bitnet_triton.cache import GrowingLayer, grow_in_place

B, HK, D = 2, 3, 8


def tokens(n):
    return torch.randn(B, HK, n, D), torch.randn(B, HK, n, D)


def both():
    return GrowingLayer(), DynamicLayer()


def same(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


def append(layers, n):
    new = tokens(n)
    for layer in layers:
        keys, values = layer.update(*(t.clone() for t in new))
        assert keys is layer.keys
        assert values is layer.values


@pytest.mark.parametrize("steps", [[1, 1, 1], [7, 1, 1], [300, 1, 200, 1], [0, 2]])
def test_holds_what_was_appended(steps):
    layers = both()
    for n in steps:
        append(layers, n)
        same(*layers)


def test_a_step_does_not_move_what_is_held():
    layer = GrowingLayer()
    layer.update(*tokens(10))
    address, capacity = layer.keys.data_ptr(), layer.key_store.shape[-2]
    for _ in range(capacity - 10):
        layer.update(*tokens(1))
    assert layer.keys.data_ptr() == address
    layer.update(*tokens(1))
    assert layer.keys.data_ptr() != address
    assert layer.get_seq_length() == capacity + 1


def test_the_memory_stays_within_a_quarter():
    layer = GrowingLayer()
    for _ in range(20):
        layer.update(*tokens(500))
    assert layer.key_store.shape[-2] <= 1.25 * 10000 + 500


def crop(layer):
    layer.crop(-3)


def reorder(layer):
    layer.reorder_cache(torch.tensor([1, 1]))


def repeat(layer):
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))


def reset(layer):
    layer.reset()
    if type(layer) is DynamicLayer:  # that of transformers 5.17 keeps as many zeros
        layer.keys = layer.values = None
        layer.is_initialized = False


def offload(layer):
    layer.offload()
    layer.prefetch()


@pytest.mark.parametrize("change", [crop, reorder, repeat, reset, offload])
def test_goes_on_after_a_change(change):
    layers = both()
    append(layers, 9)
    append(layers, 1)
    for layer in layers:
        change(layer)
    append(layers, 2)
    same(*layers)
    append(layers, 400)
    append(layers, 1)
    same(*layers)


def test_cropped_tokens_are_overwritten_in_place():
    layer = GrowingLayer()
    layer.update(*tokens(9))
    address = layer.keys.data_ptr()
    layer.crop(-4)
    layer.update(*tokens(2))
    assert layer.keys.data_ptr() == address
    assert layer.get_seq_length() == 7


def test_a_copy_does_not_share_memory():
    layer = GrowingLayer()
    layer.update(*tokens(5))
    other = copy.deepcopy(layer)
    kept = layer.keys.clone()
    other.crop(-2)
    other.update(*tokens(2))
    assert torch.equal(layer.keys, kept)


def test_what_others_wrote_into_the_stores_is_held_after_advance():
    layers = both()
    append(layers, 4)
    ours, theirs = layers
    keys, values = tokens(2)
    ours.reserve(2)
    ours.key_store[:, :, 4:6] = keys
    ours.value_store[:, :, 4:6] = values
    ours.advance(2)
    theirs.update(keys, values)
    same(ours, theirs)


def test_gradients_reach_every_token():
    layer = GrowingLayer()
    first, second = (torch.randn(B, HK, 2, D, requires_grad=True) for _ in range(2))
    loss = 0
    for new in (first, second):
        keys, values = layer.update(new, new * 2)
        loss = loss + (keys**2).sum() + (values**2).sum()
    loss.backward()
    torch.testing.assert_close(first.grad, 2 * (2 + 8) * first.detach())
    torch.testing.assert_close(second.grad, (2 + 8) * second.detach())


def test_is_a_layer_of_transformers_cache():
    cache = Cache(layers=[GrowingLayer(), GrowingLayer()])
    for layer in range(2):
        cache.update(*tokens(3), layer)
    assert cache.get_seq_length() == 3
    cache.crop(-1)
    assert cache.get_seq_length(1) == 2


def test_plain_layers_of_a_cache_are_turned_and_keep_what_they_hold():
    sliding = DynamicSlidingWindowLayer(8)
    cache = Cache(layers=[DynamicLayer(), sliding])
    other = DynamicLayer()
    append((cache.layers[0], other), 5)
    grow_in_place(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, DynamicSlidingWindowLayer]
    append((cache.layers[0], other), 2)
    same(cache.layers[0], other)


@pytest.mark.parametrize("first", [3, 300])
def test_tokens_of_inference_mode_can_be_continued_outside_of_it(first):
    layers = both()
    with torch.inference_mode():
        append(layers, first)
        append(layers, 1)
    for change in (None, "crop", "reorder", "reserve"):
        for layer in layers:
            if change == "crop":
                layer.crop(-2)
            elif change == "reorder":
                layer.reorder_cache(torch.tensor([1, 0]))
            elif change == "reserve" and layer is layers[0]:
                layer.reserve(1)
                assert not any(store.is_inference() for store in layer.stores)
        append(layers, 1)
        same(*layers)
    assert not layers[0].keys.is_inference()


def test_a_layer_that_keeps_more_is_not_plain_unless_it_says_so():
    class More(GrowingLayer):
        pass

    class Same(GrowingLayer):
        is_plain = True

    assert [layer.is_plain for layer in (GrowingLayer, More, Same)] == [True, False, True]
