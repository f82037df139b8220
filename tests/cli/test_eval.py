"""``bitnet-triton eval`` on the embedded recall model."""

import json

import pytest
from typer.testing import CliRunner

from bitnet_triton.cli import app

runner = CliRunner()
QUICK = ["--length", "256", "--samples", "2", "--no-text"]


def run(*arguments):
    return runner.invoke(app, ["eval", *arguments], catch_exceptions=False, env={"COLUMNS": "200"})


def test_prints_scores_beside_chance_and_what_they_cost():
    result = run("--task", "passkey", "--task", "common_words", "--attention", "full",
                 "--attention", "sliding:window=32", *QUICK)  # fmt: skip
    assert result.exit_code == 0
    (passkey,) = (line for line in result.stdout.splitlines() if " passkey " in line)
    assert " 1.0 " in passkey  # chance
    (common,) = (line for line in result.stdout.splitlines() if " common_words (hard) " in line)
    assert " 0.9 " in common
    rows = [line for line in result.stdout.splitlines() if "│ full" in line or "│ sliding" in line]
    assert [" 256.0 " in rows[0], " 32.0 " in rows[1]] == [True, True]


def test_writes_json_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("--task", "needles", "--output", str(tmp_path), *QUICK)
    assert result.exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    score = report["scores"]["checkpoint"]["needles"]["256"]
    assert score["low"] <= score["mean"] <= score["high"]
    assert report["run"]["seed"] == 0
    assert report["command"].startswith("bitnet-triton")
    for name in ("depth.png", "cost.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_folder_goes_on_and_another_run_is_refused(tmp_path):
    arguments = ["--task", "passkey", "--output", str(tmp_path), *QUICK]
    run(*arguments)
    before = (tmp_path / "lines.jsonl").read_text()
    run(*arguments)
    assert (tmp_path / "lines.jsonl").read_text() == before
    with pytest.raises(ValueError, match="holds a run with other seed"):
        run(*arguments, "--seed", "1")


def test_help_shows_examples():
    assert "bitnet-triton eval --length 4096" in " ".join(run("--help").stdout.split())
