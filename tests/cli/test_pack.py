"""``bitnet-triton pack``: what it says and what it refuses."""

import re

import pytest
import torch
from typer.testing import CliRunner

import bitnet_triton as bt
from bitnet_triton.cli import app, main

runner = CliRunner()


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    config = bt.BitNetConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    bt.BitNetForCausalLM(config).save_pretrained(folder)
    return folder


def test_packs_and_says_what_it_did(masters, tmp_path, steady_ids):
    result = runner.invoke(app, ["pack", str(masters), str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert re.search(r"14 ternary matrices, \d+ tensors, all checked", result.stdout)
    models = [
        bt.BitNetForCausalLM.from_pretrained(folder) for folder in (masters, tmp_path / "packed")
    ]
    tokens = steady_ids(*models, B=1, T=8)
    with bt.use_backend("reference"), torch.inference_mode():
        before, after = (model(tokens).logits for model in models)
    assert (after - before).norm() <= 1e-5 * before.norm()


def test_refuses_a_target_with_files_in_one_line(masters, capsys, monkeypatch):
    before = {file.name: file.read_bytes() for file in masters.iterdir()}
    monkeypatch.setattr("sys.argv", ["bitnet-triton", "pack", str(masters), str(masters)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "expected a new or empty folder" in " ".join(capsys.readouterr().err.split())
    assert {file.name: file.read_bytes() for file in masters.iterdir()} == before
