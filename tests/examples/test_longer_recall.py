"""The example of longer recall trains on positions that skip, counts by depth, and goes on."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import bitnet_triton as bt
from bitnet_triton.training.tasks import TextTokens

SCRIPT = Path(__file__).parents[2] / "examples" / "longer_recall.py"
SIZES = {"CONTEXT": 256, "TIMES": 2, "QUESTIONS": 4, "PLACES": 4}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("longer_recall", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SIZES.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.longer, "STRETCH", 32)
    return module


def test_positions_go_on_within_pieces_and_reach_far(script):
    rng, ends = random.Random(torch.initial_seed()), []
    for _ in range(100):
        places = torch.tensor(script.skipping(rng, 64, 512))
        steps = places.diff()
        assert places[0] == 0
        assert len(places) == 64
        assert (steps >= 1).all()
        assert (steps > 1).sum() < script.PIECES
        ends.append(int(places[-1]))
    assert 63 <= min(ends) < 200 < 400 < max(ends) < 512


def test_rows_are_one_text_that_skips_and_ordinary_ones_in_turns(script):
    tokens = TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL), held_out=False)
    for step in range(4):
        row = script.make_row(step, tokens)
        steps = torch.tensor(row.places).diff()
        assert len(row.ids) == len(row.places) == 256
        assert 2 in row.kind
        if step % 2:  # texts start again, none skips
            assert ((steps == 1) | (torch.tensor(row.places[1:]) == 0)).all()
        else:
            assert (steps >= 1).all()
            assert (steps > 1).any()


def test_training_reads_across_a_skip(script):
    """An answer in the last piece needs what stands in the first one."""
    ids = torch.randint(1, 590, (40,)).tolist()
    losses = []
    for first in (ids[0], ids[0] % 589 + 1):
        row = script.former.Row()
        row.add([first, *ids[1:]], [0] + [1] * 29 + [2] * 10)
        row.places = [*range(20), *range(300, 320)]
        model = script.tiny.load_masters(Path(bt.RECALL_MODEL))
        model.config._attn_implementation = "bitnet_triton"
        answer, _, _ = script.former.Training(model, 1e-4, 4096).learn(row, 0.1)
        losses.append(answer)
    assert losses[0] != losses[1]


def test_answers_are_counted_by_length_and_depth_and_bits_by_place(script, monkeypatch):
    monkeypatch.setattr(script, "METHODS", ("none",))
    lines = []
    for when, scores in (("before", (0.0, 1.0)), ("after", (1.0, 1.0))):
        head = {"when": when, "method": "none"}
        for length in (256, 512):
            found = [[0.05, 1.0], [0.5, scores[0]], [1.0, scores[1]]]
            # another prompt
            lines.append({**head, "kind": "recall", "length": length, "found": found})
            lines.append({**head, "kind": "recall", "length": length, "found": [[0.45, 0.0]]})
            bits = [[float(place + length) for place in range(8)]]
            lines.append({**head, "kind": "text", "length": length, "found": bits})
    before, after = script.summarise(lines, torch.full((8,), 4.0))
    assert (before["when"], after["when"]) == ("before", "after")
    assert before["answers"] == {256: 4, 512: 4}
    assert before["right"] == {256: 0.5, 512: 0.5}
    assert after["right"][512] == 0.75
    assert before["by_depth"] == [1.0, None, 0.0, None, 1.0]
    assert after["by_depth"] == [1.0, None, 0.5, None, 1.0]
    assert before["bits_per_byte_256"] == pytest.approx((256 + 3.5) / 4, abs=1e-4)
    assert before["by_position_512"] == [round((512.5 + 2 * place) / 4, 4) for place in range(4)]
    assert "| after | none | 75 | 75 | 100 |  | 50 |  | 100 |" in script.as_markdown([after])


def test_a_run_measures_trains_and_goes_on_without_doing_it_again(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(script, "METHODS", ("none", "yarn", "longrope"))
    found = {"long": {"factors": [1.5] * 32}}
    monkeypatch.setattr(script, "search_longrope", lambda job: found)
    monkeypatch.setattr(script, "lengths", lambda: (256, 512))
    app = script.typer.Typer()
    app.command()(script.main)
    arguments = ["--output", str(tmp_path), "--tokens", "512", "--prompts", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "longer-recall.json").read_text())
    rows = [(row["when"], row["method"]) for row in written["rows"]]
    assert rows == [(w, m) for w in ("before", "after") for m in ("none", "yarn", "longrope")]
    assert {tuple(row["answers"].values()) for row in written["rows"]} == {(8, 8)}
    # within what the model was trained on, it finds pairs
    assert written["rows"][0]["right"]["256"] > 0.7
    assert (tmp_path / "longer-recall.png").read_bytes().startswith(b"\x89PNG")
    trained = bt.BitNetForCausalLM.from_pretrained(tmp_path / "longrope")
    assert trained.config.rope_parameters["long_factor"] == [1.5] * 32

    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(script.longer, "text_bits", fail)
    for name in ("recall", "train"):
        monkeypatch.setattr(script, name, fail)
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "longer-recall.json").read_text()) == written
