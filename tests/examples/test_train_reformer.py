"""The training script of Reformer runs, and more rounds find what few have missed."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_reformer.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_reformer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_short_copy_is_learned(script, capsys):
    arguments = "--length 7 --symbols 5 --width 64 --heads 2 --window 4 --lr 0.02 --steps 120"
    results = script.main([*arguments.split(), "--rounds", "2"])
    one, *_, eight = results[2]
    assert eight > 0.6  # a fifth by guessing
    assert eight > one
    assert "trained with | evaluated with" in capsys.readouterr().out


def test_the_second_half_is_the_first(script):
    ids = script.draw(3, 6, 9, torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, :7], ids[:, 7:])
    assert not ids[:, [0, 7]].any()
    assert ids[:, 1:7].min() >= 1
    model = script.CopyModel(9, 6, 16, 2, 4)
    logits, wanted = script.halves(model, ids, 1, 0)
    assert torch.equal(wanted, ids[:, 1:7])
    assert logits.shape == (3, 6, 10)
