"""The example of calibration: where its model starts, and that its table says what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "calibrate_layers.py"
RESULTS = Path(__file__).parents[2] / "docs" / "evaluation" / "calibration.json"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train_recall", raising=False)
    spec = importlib.util.spec_from_file_location("calibrate_layers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_seed_says_which_layers_get_the_head_start(script):
    first = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = script.recipe.new_model(script.recipe.PRESETS["deep"])
        layers = list(model.model.layers)
        script.recipe.head_start(model)
        assert list(model.model.layers) == layers
        # all four heads of one layer begin by matching tokens, their other channels are 0
        queries = [layer.self_attn.q_proj.weight for layer in layers]
        empty = [(weight == 0).all(1).float().mean().item() for weight in queries]
        first.append(max(range(1, 8), key=empty.__getitem__))
    assert first == [7, 5]


def test_plans_of_the_recall_model_are_compared(script, tmp_path):
    command = [
        "compare", str(bt.RECALL_MODEL), "--output", str(tmp_path), "--counts", "1", "--tokens",
        "256", "--length", "128", "--samples", "1", "--attention", "sliding:window=16",
    ]  # fmt: skip
    result = CliRunner().invoke(script.recipe.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    plans = json.loads((tmp_path / "table.json").read_text())["plans"]
    assert {name: plan["full"] for name, plan in plans.items()} == {
        "full attention": None, "1 full: most harmed": [1], "1 full: every 3 from 0": [0],
        "1 full: every 3 from 2": [2], "no layer full": [],
    }  # fmt: skip
    assert plans["full attention"]["accuracy"]["passkey"] == 1
    assert plans["no layer full"]["accuracy"]["passkey"] == 0
    assert "| 1 full: most harmed | 1 |" in (tmp_path / "table.md").read_text()
    ahead = plans["1 full: every 3 from 0"]["calibrated ahead"]["1 full: most harmed"]
    gain = plans["1 full: most harmed"]["mean"] - plans["1 full: every 3 from 0"]["mean"]
    assert ahead["accuracy"][0] == pytest.approx(gain, abs=1e-6)
    lower = plans["1 full: most harmed"]["loss"] - plans["1 full: every 3 from 0"]["loss"]
    assert ahead["loss"][0] == pytest.approx(lower, abs=1e-4)


def test_intervals_are_those_of_paired_differences(script):
    mean, low, high = script.interval(torch.tensor([0.1, 0.3, 0.2, 0.2]))
    assert mean == pytest.approx(0.2)
    half = 1.96 * (0.02 / 3) ** 0.5 / 2
    assert (low, high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))


def test_calibrated_plans_serve_both_published_models_and_no_rule_does():
    models = list(json.loads(RESULTS.read_text()).values())
    assert len(models) == 2
    for count in (2, 4):
        lost: dict[str, list[float]] = {}
        for plans in (model["plans"] for model in models):
            full = plans["full attention"]["mean"]
            same = {name: plan for name, plan in plans.items() if name.startswith(f"{count} full")}
            for name, plan in same.items():
                lost.setdefault(name, []).append(full - plan["mean"])
            best = f"{count} full: most harmed"
            assert all(plans[best]["harm"] <= plan["harm"] for plan in same.values())
        assert max(lost.pop(best)) < 0.03
        assert len(lost) == 8 // count
        assert all(max(both) > 0.1 for both in lost.values())


def test_no_rule_is_shown_to_be_better_than_a_calibrated_plan():
    """By 95 % intervals of what prompts differ by: accuracy may be lower, a loss is not higher."""
    for model in json.loads(RESULTS.read_text()).values():
        plans = model["plans"]
        rules = {name: plan for name, plan in plans.items() if "every" in name}
        for rule in rules.values():
            for ahead in rule.get("calibrated ahead", {}).values():
                assert ahead["accuracy"][2] > 0
                assert ahead["loss"][2] < 0
    assert "calibrated ahead" in plans_of_seed(1)["4 full: every 2 from 1"]


def plans_of_seed(seed):
    return json.loads(RESULTS.read_text())[f"seed {seed}"]["plans"]
