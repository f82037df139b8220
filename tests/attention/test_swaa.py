"""The presets of SWAA, every recipe in every combination, and what is refused."""

from itertools import product

import pytest

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.swaa import PRESETS, choose_layers

LAYERS = 8


def plan(value):
    return AttentionPlan.from_config(value, LAYERS)


@pytest.mark.parametrize(
    ("name", "sinks", "full_decode", "full"),
    [
        ("swaa", 0, False, []),
        ("swaa-untrained", 128, True, [1, 3, 5, 7]),
        ("swaa-untrained-fast", 128, True, []),
        ("swaa-trained", 0, True, [1, 3, 5, 7]),
        ("swaa-trained-fast", 0, False, [1, 3, 5, 7]),
    ],
)
def test_a_preset_is_a_plan(name, sinks, full_decode, full):
    got, sliding = plan(name), Sliding(4096, sinks)
    for layer in range(LAYERS):
        assert got.mode(layer, "prefill") == (Full() if layer in full else sliding)
        is_full = full_decode or layer in full
        assert got.mode(layer, "decode") == (Full() if is_full else sliding)
    assert plan(got.to_config()) == got


def test_the_presets_above_are_all():
    assert set(PRESETS) == {args[0] for args in test_a_preset_is_a_plan.pytestmark[0].args[1]}


@pytest.mark.parametrize(
    ("window", "sinks", "full_decode", "full"),
    list(product([3, 64], [0, 2], [False, True], [[], [0, 7], list(range(LAYERS))])),
)
def test_every_setting_can_be_changed_beside_the_name(window, sinks, full_decode, full):
    settings = {"window": window, "sinks": sinks, "full_decode": full_decode, "full_layers": full}
    plans = [plan({"preset": name, **settings}) for name in PRESETS]
    assert all(other == plans[0] for other in plans)
    for layer in range(LAYERS):
        prefill = Full() if layer in full else Sliding(window, sinks)
        assert plans[0].modes(layer) == (prefill, Full() if full_decode else prefill)
        bounded = layer not in full and not full_decode
        assert plans[0].memory(layer).is_sliding == bounded


@pytest.mark.parametrize(
    ("word", "layers"),
    [
        ("odd", {1, 3, 5, 7}),
        ("even", {0, 2, 4, 6}),
        ("every-4", {3, 7}),
        ("every-3", {2, 5}),
        ("every-9", set()),
        ([2, 0, 2], {0, 2}),
    ],
)
def test_layers_are_chosen_by_a_word_or_a_list(word, layers):
    assert choose_layers(word, LAYERS) == layers


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("swaa-untraind", ValueError, "did you mean"),
        ({"preset": "swa"}, ValueError, r"expected a preset out of: swaa, .*; got 'swa'"),
        (
            {"preset": "swaa", "keep_first": 4},
            ValueError,
            r"setting of preset 'swaa' out of: window, sinks, full_decode, full_layers; got",
        ),
        ({"preset": "swaa", "window": 0}, ValueError, "'window': expected at least 1"),
        ({"preset": "swaa", "full_decode": 1}, TypeError, "'full_decode': expected true or false"),
        ({"preset": "swaa", "full_layers": [8]}, ValueError, "expected layers below 8, got 8"),
        ({"preset": "swaa", "full_layers": [-1]}, ValueError, "expected at least 0, got -1"),
        ({"preset": "swaa", "full_layers": "every-0"}, ValueError, "'every-N' or a list, got 'eve"),
        ({"preset": "swaa", "full_layers": "most"}, ValueError, "'every-N' or a list, got 'most'"),
        ({"preset": "swaa", "full_layers": 2}, TypeError, "expected a word or a list, got int"),
    ],
)
def test_what_is_no_preset_is_refused_by_name(value, error, message):
    with pytest.raises(error, match=message):
        plan(value)


def test_a_preset_needs_the_number_of_layers():
    with pytest.raises(ValueError, match="`layers`: a preset needs"):
        AttentionPlan.from_config("swaa")
