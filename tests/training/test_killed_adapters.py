"""LoRA beside packed weights, killed while it saves, ends bit for bit as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet_triton.training.checkpoints import LIST

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("killed_adapters.py")


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_adapters_and_optimizer_go_on_from_the_last_whole_checkpoint(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # the fifth file stands in the second of the checkpoints of steps 2, 4 and 6
    first, killed = run(whole), run(broken, 5)
    assert first.returncode == 0, first.stderr
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (broken / "checkpoint-4").is_dir()
    assert not (broken / "checkpoint-4" / LIST).exists()
    second = run(broken)
    assert second.returncode == 0, second.stderr
    told = [json.loads((folder / "done.json").read_text()) for folder in (whole, broken)]
    assert told[1]["resumed"] == str(broken / "checkpoint-2")
    assert told[0]["losses"] == told[1]["losses"]
    assert len(set(told[0]["losses"])) == 6
    expected, found = (torch.load(folder / "end.pt") for folder in (whole, broken))
    assert expected["adapters"].keys() == found["adapters"].keys()
    for name, tensor in expected["adapters"].items():
        assert torch.equal(found["adapters"][name], tensor), name
    for index, state in expected["optimizer"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer"][index][name], value), (index, name)
