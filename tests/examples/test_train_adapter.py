"""The example of LoRA beside packed weights runs, and its adapter has learned the text."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytestmark = pytest.mark.peer
SCRIPT = Path(__file__).parents[2] / "examples" / "train_adapter.py"


def test_the_adapter_writes_what_it_was_taught(capsys, tmp_path):
    assert len(SCRIPT.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("train_adapter", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path))
    told = dict(
        line.split(":", 1) for line in capsys.readouterr().out.splitlines() if "adapter:" in line
    )
    assert "return width * height" in told["with the adapter"]
    assert "return width * height" not in told["without the adapter"]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**20 * 4
