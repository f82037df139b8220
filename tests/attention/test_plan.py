"""AttentionPlan: plain data in, plain data out, and every refusal."""

import json
from dataclasses import dataclass

import pytest

from bitnet_triton.attention import MODES, AttentionPlan
from bitnet_triton.attention.full import Full


@dataclass(frozen=True)
class Window:
    window: int
    sinks: int = 0


@pytest.fixture(autouse=True)
def _two_modes(monkeypatch):
    monkeypatch.setitem(MODES, "window", Window)


@pytest.mark.parametrize(
    ("value", "prefill", "decode"),
    [
        ("full", [Full()], [Full()]),
        ({"mode": "full"}, [Full()], [Full()]),
        ({"mode": "window", "window": 4, "sinks": 1}, [Window(4, 1)], [Window(4, 1)]),
        ({"prefill": "full", "decode": {"mode": "window", "window": 8}}, [Full()], [Window(8)]),
        (
            {"prefill": ["full", {"mode": "window", "window": 2}], "decode": "full"},
            [Full(), Window(2)],
            [Full()],
        ),
    ],
)
def test_plain_data_becomes_a_plan_and_comes_back(value, prefill, decode):
    plan = AttentionPlan.from_config(value)
    assert (list(plan.prefill), list(plan.decode)) == (prefill, decode)
    data = json.loads(json.dumps(plan.to_config()))
    assert AttentionPlan.from_config(data) == plan
    assert AttentionPlan.from_config(data).to_config() == data


def test_each_layer_and_phase_has_its_mode():
    plan = AttentionPlan.from_config(
        {"prefill": ["full", {"mode": "window", "window": 2}], "decode": "full"}
    )
    modes = {(i, p): plan.mode(i, p) for i in range(2) for p in ("prefill", "decode")}
    assert modes == {
        (0, "prefill"): Full(),
        (1, "prefill"): Window(2),
        (0, "decode"): Full(),
        (1, "decode"): Full(),
    }


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ful", ValueError, r"out of: full, window; got 'ful'; did you mean 'full'\?"),
        ("windw", ValueError, r"got 'windw'; did you mean 'window'\?"),
        ({"mode": 3}, ValueError, "out of: full, window; got 3"),
        ({}, ValueError, "out of: full, window; got None"),
        (
            {"mode": "window", "window": 3, "sink": 2},
            ValueError,
            r"no setting 'sink' \(settings: window, sinks\); did you mean 'sinks'",
        ),
        ({"mode": "full", "window": 3}, ValueError, r"no setting 'window' \(settings: none\)"),
        ({"mode": "window"}, TypeError, "`attention`: mode 'window': .*'window'"),
        ({"prefill": "full"}, ValueError, "expected the phases 'prefill' and 'decode', got"),
        ({"prefill": "full", "decode": "full", "x": 1}, ValueError, "got 'prefill', 'decode', 'x'"),
        ({"prefill": 1, "decode": "full"}, TypeError, "expected a name or a dict, got int"),
        (["full"], TypeError, "expected a name or a dict, got list"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(value, error, message):
    with pytest.raises(error, match=message):
        AttentionPlan.from_config(value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_plan_has_one_mode_or_one_a_layer(count):
    plan = AttentionPlan((Full(),), (Full(),) * count)
    if count == 1:
        plan.check_layers(2)
        return
    with pytest.raises(ValueError, match=f"one mode or 2, one a layer, got {count} for 'decode'"):
        plan.check_layers(2)
