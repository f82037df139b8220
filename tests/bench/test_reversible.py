"""The benchmark of reversible layers: what it writes is what it has measured."""

import json

from typer.testing import CliRunner

from bench import reversible
from bench.__main__ import app


def test_command_writes_memory_by_depth(tmp_path, monkeypatch):
    target = tmp_path / "reversible.json"
    monkeypatch.setattr(reversible, "DEPTHS", (2, 4))
    arguments = ["reversible", "--width", "32", "--tokens", "64", "--rounds", "1"]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads(target.read_text())["rows"]
    assert [(r["layers"], r["provider"]) for r in rows] == [
        (layers, name) for layers in (2, 4) for name in reversible.LABELS
    ]
    peaks = {(r["provider"], r["layers"]): r["activation_bytes"] for r in rows}
    assert peaks["plain", 4] > 1.3 * peaks["plain", 2]
    assert peaks["reversible", 4] < 1.1 * peaks["reversible", 2]
    assert all(len(r["seconds"]) == 1 for r in rows)
