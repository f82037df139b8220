"""The training script of hybrids runs, and starts as its docs say."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "train_hybrid.py"
runner = CliRunner()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("train_nsa", "train_recall"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("train_hybrid", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.twins.SIZES = replace(module.twins.SIZES, row=192, start=128)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["hybrid", "linear"])
def test_trains_and_saves_what_is_loaded(attention, script, tmp_path):
    command = ["train", "--output", str(tmp_path), "--steps", "2", "--attention", attention]
    result = runner.invoke(script.twins.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["step"] == 2
    model = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    names = [model.attention_plan.mode(index, "decode").name for index in range(4)]
    assert names == ["linear", "full" if attention == "hybrid" else "linear", "linear", "linear"]


@torch.no_grad()
def test_the_first_layer_starts_with_the_token_before(script):
    """Only the first two heads, and of them only values that stand one token back."""
    torch.manual_seed(0)
    model = script.twins.new_model(script.twins.SIZES, "hybrid").eval()
    entered = []
    norm = model.model.layers[0].self_attn.attn_sub_norm
    norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    ids = torch.randint(3, 1000, (1, 12))
    changed = ids.clone()
    changed[0, 5] += 1
    for each in (ids, changed):
        model(each, use_cache=False)
    far = (entered[0] - entered[1]).abs()[0, :, :128].amax(-1) / entered[0].abs().max()
    assert far[:5].max() == 0
    assert far[6] > 0.1
    assert far[7:].max() < 0.05 * far[6]
