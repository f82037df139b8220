"""The example of all rope methods reads every token once, compares in pairs, and goes on."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "longer_contexts.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("longer_contexts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("TIMES", 2), ("STRETCH", 32)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.tiny, "CONTEXT", 64)
    return module


@pytest.fixture
def plain(tmp_path):
    """The embedded text model as if it had never been extended."""
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.TINY_MODEL, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, fuse=False
    )
    folder = tmp_path / "plain"
    model.config.max_position_embeddings = 64
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(bt.TINY_MODEL) / name).read_bytes())
    return folder


def test_texts_share_no_token_that_is_predicted(script):
    files = [
        torch.arange(start, start + size) for start, size in ((0, 300), (1000, 129), (2000, 128))
    ]
    texts, numbers = script.cut(files, 128)
    assert numbers == [0, 0, 1]
    assert [len(text) for text in texts] == [129] * 3
    predicted = torch.cat([text[1:] for text in texts])
    assert len(predicted.unique()) == 3 * 128


def test_bits_are_the_loss_of_each_window_alone(script, plain):
    model = script.load(plain)
    text = torch.randint(1, 4096, (129,))
    for window in (64, 128):
        (bits,) = script.text_bits(model, [text], window)
        assert len(bits) == 4
        wanted = 0.0
        for start in range(0, 128, window):
            logits = model(text[None, start : start + window], use_cache=False).logits[0]
            goal = text[start + 1 : start + window + 1]
            chances = logits.double().softmax(-1).gather(1, goal[:, None])
            wanted -= chances.log2().sum().item()
        assert sum(bits) == pytest.approx(wanted, rel=1e-3)


def test_a_change_is_that_of_all_texts_with_an_interval_of_whole_files(script):
    b = [[3.0, 2.0], [4.0, 6.0], [10.0, 0.0], [7.0, 1.0]]
    a = [[1.1 * bits for bits in text] for text in b]
    assert script.change(b, b, [0, 0, 1, 2]) == [0, 0, 0]
    assert script.change(a, b, [0, 0, 1, 2]) == [10, 10, 10]
    a[3] = [16.0, 0.0]  # one file costs twice as much, all others a tenth more
    middle, low, high = script.change(a, b, [0, 0, 1, 2])
    assert middle == pytest.approx(100 * (43.5 / 33 - 1), abs=0.01)
    assert (low, high) == (10, 100)  # 1 of 27 draws has that file alone, 8 of 27 are without it
    # both texts of one file are drawn together: there is nothing to draw
    assert len(set(script.change(a, b, [5, 5, 5, 5]))) == 1


def test_positions_are_those_within_a_window(script):
    def line(method, window, found):
        return {
            "when": "before", "method": method, "factor": 2, "window": window, "found": found,
        }  # fmt: skip

    plain_bits = [[8.0, 4.0, 8.0, 4.0], [16.0, 8.0, 16.0, 8.0]]
    longer = [[8.0, 4.0, 2.0, 1.0], [16.0, 8.0, 4.0, 2.0]]
    lines = [line("none", 64, plain_bits), line("yarn", 128, longer), line("longrope", 128, longer)]
    result = script.summarise(lines, torch.full((2, 4), 2.0), [0, 1])
    short, yarn, longrope = result["text"]
    assert short["by_position"] == [6.0, 3.0]
    assert yarn["by_position"] == [6.0, 3.0, 1.5, 0.75]
    assert short["bits_per_byte"] == 4.5
    assert yarn["change"] == [-37.5] * 3
    assert longrope["change_from_yarn"] == [0, 0, 0]
    lines.append(line("yarn", 64, plain_bits))
    del lines[2]
    text = script.as_markdown(script.summarise(lines, torch.full((2, 4), 2.0), [0, 1]))
    assert (
        "| before | yarn | 128 | 2.812 | -37.5 % (-37.5 to -37.5) | +0.0 % (+0.0 to +0.0) |" in text
    )


def test_a_run_measures_trains_and_goes_on_without_doing_it_again(
    script, plain, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    texts = script.tiny.read_texts(held_out=True, files=4)
    monkeypatch.setattr(script.tiny, "read_texts", lambda *, held_out, files: texts)
    monkeypatch.setattr(script, "METHODS", ("none", "yarn", "longrope"))
    monkeypatch.setattr(script, "TIMES", 4)
    monkeypatch.setattr(script.tiny, "CONTEXT", 32)
    monkeypatch.setattr(script, "YARNS", ("yarn", "mild_yarn"))
    monkeypatch.setattr(script, "TRAININGS", (("longrope", 2), ("mild_yarn", 2)))
    jobs = []

    def searched(job):
        jobs.append(job)
        assert all(Path(path).read_text(encoding="utf-8") for path in job.texts)
        return {"long": {"factors": [1.5] * 32}}

    monkeypatch.setattr(script, "search_longrope", searched)
    app = script.typer.Typer()
    app.command()(script.main)
    arguments = ["--source", str(plain), "--output", str(tmp_path / "run"), "--tokens", "512"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [job.fitness for job in jobs] == ["text"]
    found = json.loads((tmp_path / "run" / "longer-contexts.json").read_text())
    cells = [(row["when"], row["method"], row["factor"], row["window"]) for row in found["text"]]
    assert len(cells) == len(set(cells)) == 2 * (3 + 2 + 2)
    assert (tmp_path / "run" / "longer-contexts.png").read_bytes().startswith(b"\x89PNG")
    packed = bt.BitNetForCausalLM.from_pretrained(tmp_path / "run" / "longrope-2-packed")
    rope = packed.config.rope_parameters
    assert (rope["rope_type"], rope["long_factor"]) == ("longrope", [1.5] * 32)
    assert rope["original_max_position_embeddings"] == 64  # of its config
    mild = bt.BitNetConfig.from_pretrained(tmp_path / "run" / "mild_yarn-2-packed").rope_parameters
    # what cosines and sines are multiplied by: of scores it is the square
    assert (mild["rope_type"], mild["factor"]) == ("yarn", 2)
    assert mild["attention_factor"] ** 2 == pytest.approx(0.1 * math.log(2) + 1)

    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(script, "text_bits", fail)
    monkeypatch.setattr(script.tiny, "train_on_windows", fail)
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "run" / "longer-contexts.json").read_text()) == found
