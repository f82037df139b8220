"""The example that distils runs on a few files, and makes its table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "distill_tiny.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("distill_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 64)
    monkeypatch.setattr(module, "STEP", 256)
    monkeypatch.setattr(module.tiny, "CONTEXT", 64)
    return module


def small_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_the_table_is_made_once(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "dense_model", small_model)
    read = script.tiny.read_texts
    monkeypatch.setattr(
        script.tiny, "read_texts", lambda **part: [text[:4000] for text in read(**part)]
    )
    app = typer.Typer()
    app.command()(script.main)
    arguments = ["--output", str(tmp_path), "--dense-tokens", "1024", "--tokens", "512",
                 "--seeds", "1", "--files", "3"]  # fmt: skip
    with bt.use_backend("reference"):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "distillation.json").read_text())
    runs = found["runs"]
    assert runs.keys() == {"without-0", "distilled-0"}
    bits = [found["dense"], found["rounded"], *(run["bits_per_byte"] for run in runs.values())]
    assert all(2 < value < 12 for value in bits)  # a guess is 12 bits a token
    assert len(set(bits)) == 4
    # both lessons are given on the same documents
    texts = [(tmp_path / name / "documents.jsonl").read_text() for name in runs]
    assert texts[0] == texts[1]
    monkeypatch.setattr(script, "measure", None)
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.output.splitlines()[-9:] == result.output.splitlines()[-9:]
