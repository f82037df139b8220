"""The training script of Native Sparse Attention runs, and tells where its model looks."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import bitnet_triton as bt
from bitnet_triton.attention.modes import native_sparse
from bitnet_triton.training.tasks import TextTokens

SCRIPT = Path(__file__).parents[2] / "examples" / "train_nsa.py"
runner = CliRunner()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train_recall", raising=False)
    spec = importlib.util.spec_from_file_location("train_nsa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.SIZES = replace(module.SIZES, layers=2, row=192, start=128)
    return module


@pytest.mark.slow
def test_trains_and_tells_where_it_looks(script, tmp_path):
    command = ["train", "--output", str(tmp_path), "--steps", "2", "--length", "200"]
    result = runner.invoke(script.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["step"] == 2
    assert "answer among the chosen blocks" in result.output
    assert result.output.count("layer 1, head") == 4
    again = ["look", str(tmp_path), "--length", "200"]
    told = runner.invoke(script.app, again, catch_exceptions=False).output
    assert told[told.index("┏") :] == result.output[result.output.index("┏") :]


def test_it_tells_the_blocks_that_the_mode_reads(script, monkeypatch):
    torch.manual_seed(0)
    model = script.new_model(script.SIZES, "native_sparse").eval()
    tokens = TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL))
    ids, read = script.ask(script.random.Random(0), tokens, 400).context, []
    attend = native_sparse.native_sparse_attention

    def watch(*args, **kwargs):
        out, indices = attend(*args, **kwargs, return_indices=True)
        read.append([set(head) - {-1} for head in indices[0, -1].tolist()])
        return out

    monkeypatch.setattr(native_sparse, "native_sparse_attention", watch)
    sights = list(script.look(model, ids))
    assert [sight.blocks for sight in sights] == read
    assert script.picture({0, 3}, 5, 3) == "█··◆·"
    assert script.picture({0, 3}, 5, 2) == "█·◇█·"


@pytest.mark.slow
def test_twins_are_compared_on_the_same_texts(script, tmp_path):
    for name in ("full", "window"):
        folder = tmp_path / name
        command = ["train", "--output", str(folder), "--steps", "2", "--attention", name]
        assert runner.invoke(script.app, command, catch_exceptions=False).exit_code == 0
    command = ["compare", *(str(tmp_path / name) for name in ("full", "window", "full"))]
    command += ["--rows", "2", "--samples", "2", "--length", "256"]
    command += ["--output", str(tmp_path / "found.json")]
    result = runner.invoke(script.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    full, window = found["full"], found["window"]
    assert full["mixed"] == pytest.approx(full["answers"] + 0.1 * full["text"])
    assert full["answers"] < window["answers"]  # the head start alone copies, without a window
    assert full["accuracy"]["recall"] > window["accuracy"]["recall"]
