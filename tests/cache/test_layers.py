"""Layers that hold a window and the first tokens: against a cache that holds everything."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_triton.cache import SinkWindowLayer, StreamingLayer

FREQUENCIES = 1 / 100.0 ** (torch.arange(0, 8, 2) / 8)


def tokens(columns, B=2):
    """Return keys and values [B 1 T 8] that say where they stand: row + column / 1000."""
    row = torch.arange(B)[:, None, None, None].float()
    keys = (row + torch.tensor(columns).float()[:, None] / 1000).expand(B, 1, -1, 8)
    return keys, -keys


def check(layer, held, start, end, lefts):
    """Check what an update gave that added the columns from ``start`` to ``end``."""
    keys, values = held
    assert torch.equal(keys, -values)
    dropped = end - keys.shape[2]
    for row, left in enumerate(lefts):
        got = ((keys[row, 0, :, 0] - row) * 1000).round().int().tolist()
        padding = max(left - dropped, 0)  # as masks count it
        tail = list(range(max(start - layer.recent, left), end))
        assert got[len(got) - len(tail) :] == tail
        sinks = list(range(left, min(left + layer.sinks, end)))
        assert got[padding : padding + len(sinks)] == sinks
        assert got[padding:] == sorted(set(got[padding:]))  # in order, nothing twice


@pytest.mark.parametrize("lefts", [None, (0, 3), (5, 9)], ids=str)
@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (4, 0), (4, 2), (1, 3), (40, 2)])
@pytest.mark.parametrize("slack", [0, 1, 16])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=12, deadline=None)
def test_a_step_finds_the_first_and_the_latest_tokens(sizes, slack, recent, sinks, lefts):
    layer, start = SinkWindowLayer(recent, sinks), 0
    layer.slack = slack
    for size in sizes:
        if lefts is not None:
            layer.leftpad = torch.tensor(lefts).int()
        promised, missing = layer.get_mask_sizes(size)
        held = layer.update(*tokens(range(start, start + size)))
        assert (held[0].shape[2], missing) == (promised, start + size - promised)
        check(layer, held, start, start + size, lefts or (0, 0))
        start += size
        assert layer.get_seq_length() == start
        assert layer.keys.shape[2] <= recent + sinks + slack
        # what others see in the layer is what is held, and nothing else
        check(layer, (layer.keys, layer.values), start, start, lefts or (0, 0))


@pytest.mark.parametrize("lefts", [None, (0, 3), (5, 9)], ids=str)
@pytest.mark.parametrize(("recent", "sinks"), [(4, 0), (4, 2), (1, 3), (40, 2)])
@pytest.mark.parametrize("slack", [0, 1, 16])
def test_tokens_that_others_write_into_the_stores_are_held_alike(slack, recent, sinks, lefts):
    layer = SinkWindowLayer(recent, sinks)
    layer.slack = slack
    layer.leftpad = None if lefts is None else torch.tensor(lefts).int()
    layer.update(*tokens(range(10)))
    places = []
    for column in range(10, 110):
        layer.reserve(1)
        slot, (keys, values) = layer.held, layer.stores
        keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = tokens([column])
        layer.advance(1)
        assert layer.get_seq_length() == column + 1
        check(layer, (layer.keys, layer.values), column, column + 1, lefts or (0, 0))
        places.append(layer.keys.data_ptr())
    # once it is full, memory stays where it is
    assert len(set(places[-40:])) == 1


def test_memory_stays_flat_over_a_hundred_thousand_tokens():
    layer = SinkWindowLayer(recent=60, sinks=4)
    key, value = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    held, slots = 0, set()
    for step in range(100_000):
        keys, _ = layer.update(key.fill_(step), value)
        held = max(held, keys.shape[2])
        slots.add(layer.keys.untyped_storage().nbytes())
    assert held <= 64 + layer.slack + 1
    assert max(slots) <= (64 + layer.slack) * 2 * 4
    assert keys[0, 0, :4, 0].tolist() == [0, 1, 2, 3]
    assert keys[0, 0, -61:, 0].tolist() == list(range(99_939, 100_000))


def test_a_long_prompt_is_not_kept_alive():
    layer = SinkWindowLayer(recent=4, sinks=1)
    layer.update(*tokens(range(1000)))
    assert layer.keys.shape[2] == 5
    assert layer.keys.untyped_storage().nbytes() == (5 + layer.slack) * 2 * 8 * 4


def test_gradients_flow_into_the_tokens_of_the_call():
    layer = SinkWindowLayer(recent=3, sinks=1)
    inputs = [[t.clone().requires_grad_() for t in tokens(range(c, c + 4))] for c in (0, 4)]
    sums = [sum(t.square().sum() for t in layer.update(*pair)) for pair in inputs]
    sum(sums).backward()
    assert all(t.grad.abs().sum() > 0 for pair in inputs for t in pair)


@pytest.mark.parametrize("first", [2, 12])
@pytest.mark.parametrize("kind", [SinkWindowLayer, StreamingLayer])
def test_tokens_of_inference_mode_can_be_continued_outside_of_it(kind, first):
    layer = kind(3, 1)
    with torch.inference_mode():
        layer.update(*tokens(range(first)))
        layer.update(*tokens([first]))
    for column in range(first + 1, first + 40):
        held = layer.update(*tokens([column]))
        check(layer, held, column, column + 1, (0, 0))
        assert not layer.keys.is_inference()


def test_stores_of_inference_mode_are_not_given_to_writers_outside_of_it():
    layer = SinkWindowLayer(recent=3, sinks=1)
    with torch.inference_mode():
        layer.update(*tokens(range(3)))
    layer.reserve(1)
    for store, t in zip(layer.stores, tokens([3])):
        store[:, :, 3:4] = t
    layer.advance(1)
    check(layer, (layer.keys, layer.values), 3, 4, (0, 0))


def test_keys_that_somebody_moves_are_followed():
    layer = SinkWindowLayer(recent=6, sinks=2)
    layer.update(*tokens(range(12)))
    for column in range(12, 20):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        check(layer, layer.update(*tokens([column])), column, column + 1, (0, 0))


def test_keys_that_somebody_drops_are_not_seen_again():
    layer = SinkWindowLayer(recent=6, sinks=2)
    layer.update(*tokens(range(12)))
    layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
    keys, _ = layer.update(*tokens([12]))
    assert torch.equal(keys, tokens([7, 8, 9, 10, 11, 12])[0])
    assert layer.get_mask_sizes(1) == (7, 7)


def test_a_copy_goes_its_own_way():
    layer = SinkWindowLayer(recent=6, sinks=2)
    layer.update(*tokens(range(12)))
    layer.update(*tokens([12]))
    other = copy.deepcopy(layer)
    for changed, columns in ((layer, range(13, 16)), (other, range(13, 20))):
        for column in columns:
            changed.update(*tokens([column]))
    check(layer, (layer.keys, layer.values), 16, 16, (0, 0))
    check(other, (other.keys, other.values), 20, 20, (0, 0))


@given(
    added=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    removed=st.integers(0, 7),
)
@settings(max_examples=60, deadline=None)
def test_recorded_tokens_can_be_taken_back(added, removed):
    layer = SinkWindowLayer(recent=4, sinks=2)
    layer.slack = 1
    layer.update(*tokens(range(12)))
    layer.activate_past_recording()
    end = 12
    for size in added:
        layer.update(*tokens(range(end, end + size)))
        end += size
    removed = min(removed, sum(added))
    layer.crop(-removed)
    end -= removed
    assert layer.get_seq_length() == end
    check(layer, layer.update(*tokens([end])), end, end + 1, (0, 0))
    layer.crop(0)
    assert layer.get_mask_sizes(1)[0] <= layer.kept + layer.slack + 1


def test_what_was_dropped_cannot_be_taken_back():
    layer = SinkWindowLayer(recent=4, sinks=2)
    layer.update(*tokens(range(5)))
    layer.crop(-2)  # nothing was dropped so far
    check(layer, layer.update(*tokens(range(3, 30))), 3, 30, (0, 0))
    with pytest.raises(RuntimeError, match="1 of the latest tokens cannot be taken back"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="`tokens_to_remove`: expected at most 0, got 3"):
        layer.crop(3)


def test_rows_are_chosen_and_repeated():
    layer = StreamingLayer(recent=4, sinks=2)
    layer.leftpad = torch.tensor([0, 3]).int()
    layer.update(*tokens(range(12)))
    layer.rebase(7, FREQUENCIES)
    before = layer.keys.clone()
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.keys, before[[1, 1, 0]])
    assert layer.leftpad.tolist() == [3, 3, 0]
    assert layer.shift.tolist() == [2, 2, 5]
    layer.batch_repeat_interleave(2)
    assert layer.leftpad.tolist() == [3, 3, 3, 3, 0, 0]
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(layer.keys, before)
    assert layer.shift.tolist() == [5, 2]


def test_reset_forgets_everything():
    layer = StreamingLayer(recent=4, sinks=2)
    layer.update(*tokens(range(12)))
    layer.rebase(7, FREQUENCIES)
    layer.reset()
    assert (layer.get_seq_length(), layer.shift, layer.is_initialized) == (0, None, False)
    check(layer, layer.update(*tokens(range(3))), 0, 3, (0, 0))


@pytest.mark.parametrize("name", ["recent", "sinks"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`: expected at least 0, got -1"):
        SinkWindowLayer(**{"recent": 1, "sinks": 1, name: -1})
