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
DOCS = Path(__file__).parents[2] / "docs" / "adaptation.md"
RESULTS = DOCS.parent / "evaluation" / "calibration.json"


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


def test_the_documented_table_has_what_was_measured():
    """Each row of the docs, made anew from the JSON: means, layers and losses of both models."""
    first, second = (model["plans"] for model in json.loads(RESULTS.read_text()).values())

    def row(title, names, layers=False):
        cells = [title]
        for plans in (first, second):
            found = [plans[name] for name in names]
            means = ", ".join(f"{100 * plan['mean']:.0f}" for plan in found)
            full = ", ".join(map(str, found[0]["full"])) if layers else ""
            cells += [f"{means} (layers {full})" if layers else means]
            cells += [", ".join(f"{plan['loss']:.3f}" for plan in found)]
        return f"| {' | '.join(cells)} |"

    docs = DOCS.read_text()
    assert row("full attention", ["full attention"]) in docs
    assert row("no layer full", ["no layer full"]) in docs
    for count, rule in ((2, "every fourth from 0, 1, 2, 3"), (4, "even layers, odd layers")):
        every = 8 // count
        names = [f"{count} full: every {every} from {first}" for first in range(every)]
        assert row(f"{count} of 8 full, {rule}", names) in docs
        assert row(f"{count} of 8 full, calibrated", [f"{count} full: most harmed"], True) in docs
