import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bitnet_triton
from bench.__main__ import app
from bench.case import Settings
from bench.footprint import write_checkpoint
from bench.llamacpp import peak_resident_bytes
from bench.measure import relative_error
from bench.models import DTYPE, SHAPES, RandomModels


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_checkpoint_is_the_model_that_is_timed(tmp_path, linear_class):
    size = write_checkpoint(tmp_path / "model", SHAPES["tiny"], linear_class)
    assert size == (tmp_path / "model" / "model.safetensors").stat().st_size
    ids = torch.arange(5)[None]
    expected = RandomModels(SHAPES["tiny"], Settings()).get("autobitlinear")(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=DTYPE)
    loaded = [theirs]
    if linear_class == "autobitlinear":
        loaded.append(bitnet_triton.BitNetForCausalLM.from_pretrained(tmp_path / "model"))
    with torch.no_grad():
        for model in loaded:
            assert relative_error(model(ids).logits, expected) < 2e-2


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a program from /proc")
def test_peak_of_a_program_leaves_out_what_its_parent_had():
    held = torch.ones(2**26)  # 256 MB
    script = "from bench.llamacpp import peak_resident_bytes as p; print(p())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < held.nbytes < peak_resident_bytes()


def test_command_tells_sizes_and_what_is_missing(tmp_path):
    target = tmp_path / "footprint.json"
    arguments = ["footprint", "--shape", "tiny", "--provider", "bitnet_triton"]
    outcome = CliRunner().invoke(app, [*arguments, "--threads", "1", "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    (row,) = json.loads(target.read_text())["rows"]
    assert 0 < row["loaded_bytes"] <= row["decoded_bytes"]
    outcome = CliRunner().invoke(app, ["footprint", "--provider", "mine"])
    assert "`provider`: expected bitnet_triton, " in str(outcome.exception)
