"""The benchmark of a server's memory: a real server, asked by OpenAI's client."""

import json

import pytest
from typer.testing import CliRunner

from bench import serving_memory
from bench.__main__ import app


def test_command_writes_memory_by_requests(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    target = tmp_path / "serving_memory.json"
    monkeypatch.setattr(serving_memory, "POINTS", 3)
    arguments = ["serving_memory", "--requests", "30", "--together", "4"]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads(target.read_text())["rows"]
    assert [row["requests"] for row in rows] == [0, 10, 20, 30]
    assert rows[0]["tokens"] == 0
    assert rows[-1]["tokens"] > 30  # answers of 1 to 8 tokens
    assert all(row["resident_bytes"] > 50e6 for row in rows)
