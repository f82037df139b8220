"""Two processes lose what one does with the same batch; one goes on from what two have saved."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bitnet_triton as bt
from bitnet_triton.training import last_checkpoint

SCRIPT = Path(__file__).with_name("two_trainers.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch has no gloo here"
    ),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_trainers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_two(kind, folder):
    folder.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return json.loads((folder / "done.json").read_text())


def test_ddp_under_trainer(script, tmp_path):
    expected, _ = script.train_with_trainer(tmp_path / "alone")
    losses, wrapper = run_two("ddp", tmp_path / "two")
    assert wrapper == "DistributedDataParallel"
    assert losses == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    assert last_checkpoint(tmp_path / "two").endswith("checkpoint-2")
    resumed, _ = script.train_with_trainer(tmp_path / "two")
    assert resumed == pytest.approx(expected, abs=1e-4)
    assert len({round(loss, 3) for loss in resumed}) == script.STEPS


def test_fsdp2_by_the_layers_that_the_model_names(script, tmp_path):
    alone = script.new_model()
    expected = script.train_by_hand(alone)
    losses, sharded = run_two("fsdp", tmp_path / "two")
    assert sharded == "2 layers"
    assert losses == pytest.approx(expected, abs=1e-4)
    loaded = bt.BitNetForCausalLM.from_pretrained(tmp_path / "two")
    assert loaded.config.attention == alone.config.attention
    before = script.new_model().state_dict()
    for name, tensor in alone.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=2e-4, msg=name)
