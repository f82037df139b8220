"""The benchmark of a training step's memory: its parts are those of the models."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.models import SHAPES
from bench.training_memory import LABELS, PARTS, measure

pytest.importorskip("peft")
pytestmark = pytest.mark.peer


def test_parts_are_those_of_the_models():
    shape = replace(SHAPES["tiny"], layers=5)
    rows = {r["provider"]: r for r in measure(shape, list(LABELS), 16, torch.device("cpu"), False)}
    linears = sum(N * K for N, K in shape.linears.values())
    adapters = sum(16 * (N + K) for N, K in shape.linears.values())
    norms = 3 * shape.hidden + shape.ffn
    scales = len(shape.linears)
    wanted = {
        "lora_packed": linears / 4 + 2 * norms + 4 * adapters + 4 * scales,
        "lora_autobitlinear": 2 * linears + 2 * norms + 4 * adapters + 2 * scales,
        "full": 4 * (linears + norms),
    }
    for name, row in rows.items():
        layer, of_all = row["layer_bytes"], name.startswith("full")
        assert layer["weights"] == wanted[name.removesuffix("_loss")], name
        trained = linears + norms if of_all else adapters
        assert layer["gradients"] == 4 * trained
        steps = 4 * (scales + 4 if of_all else 2 * scales)  # one counter a tensor
        assert layer["optimizer"] == 8 * trained + steps
        assert layer["activations"] > 0
        assert row["total_bytes"] == sum(row["bytes"][part] for part in PARTS)
    whole = rows["full"]["bytes"]["gradients"]
    assert whole == 4 * (5 * (linears + norms) + shape.vocab * shape.hidden + shape.hidden)


def test_command_writes_what_it_shows(tmp_path):
    target = tmp_path / "memory.json"
    arguments = ["training_memory", "--shape", "tiny", "--provider", "lora_packed"]
    arguments += ["--tokens", "8", "--checkpointing", "--output", str(target)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    (row,) = json.loads(target.read_text())["rows"]
    assert row["status"] == "measured"
    assert LABELS["lora_packed"].split()[0] in outcome.output
    outcome = CliRunner().invoke(app, ["training_memory", "--provider", "mine"])
    assert "`provider`: expected lora_packed, " in str(outcome.exception)


def test_a_loss_without_logits_takes_less_by_its_logits():
    """Beside them what a small model keeps is little."""
    shape = replace(SHAPES["tiny"], vocab=4096)
    names = ["lora_packed", "lora_packed_loss"]
    rows = {r["provider"]: r for r in measure(shape, names, 512, torch.device("cpu"), True)}
    found, less = (rows[name]["bytes"] for name in names)
    assert found["weights"] == less["weights"]
    logits = 512 * shape.vocab
    # float32 logits and their gradient at the least, against bfloat16 logits that become theirs
    assert found["activations"] - less["activations"] > 6 * logits
