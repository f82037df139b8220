"""The example of packed training runs, learns, and goes on where it was."""

import importlib.util
import json
from pathlib import Path

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "train_packed.py"


def test_the_example_trains_and_goes_on(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("train_packed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path, steps=50)
    module.main(tmp_path, steps=70)
    state = json.loads((tmp_path / "checkpoint-70" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 70]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[0]["flips"] > 0
    for line in lines:
        shares = [line[name] for name in ("share_minus", "share_zero", "share_plus")]
        assert abs(sum(shares) - 1) < 1e-6
        assert min(shares) > 0
        assert line["flips"] < 0.5
    assert bt.BitNetForCausalLM.from_pretrained(tmp_path / "model").config.attention is not None
