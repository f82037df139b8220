"""The training script of the recall model runs, resumes, and starts with heads that recall."""

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import bitnet_triton as bt
from bitnet_triton.training.tasks import TextTokens
from bitnet_triton.training.tasks.words import MARKERS, NAMES, NUMBERS

SCRIPT = Path(__file__).parents[2] / "examples" / "train_recall.py"
runner = CliRunner()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_recall", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokens():
    return TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL))


def run(script, folder, *arguments):
    command = ["train", "--output", str(folder), "--decay", "1", *arguments]
    result = runner.invoke(script.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_trains_resumes_and_logs(script, tmp_path, monkeypatch):
    small = replace(script.PRESETS["cpu"], layers=2, row=256, start=128)
    monkeypatch.setitem(script.PRESETS, "cpu", small)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    run(script, tmp_path, "--steps", "2")
    run(script, tmp_path, "--steps", "3", "--resume")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["seconds"] >= lines[1]["seconds"]
    model = bt.BitNetForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model(**tokenizer("import", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.slow
def test_the_preset_for_a_gpu_trains_at_a_small_size(script, tmp_path, monkeypatch):
    gpu = script.PRESETS["gpu"]
    small = replace(
        gpu, hidden=gpu.hidden // 4, intermediate=gpu.intermediate // 4, row=512, start=256
    )
    monkeypatch.setitem(script.PRESETS, "gpu", small)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    run(script, tmp_path, "--preset", "gpu", "--steps", "2")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    config = bt.BitNetConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == 16384
    assert (config.num_hidden_layers, config.num_attention_heads) == (gpu.layers, gpu.heads)


def test_a_head_start_copies_before_any_training(script, tokens):
    torch.manual_seed(0)
    model = script.new_model(script.PRESETS["cpu"])
    rng, right = random.Random(0), {"copy": [], "recall": []}
    for start in (False, True):
        if start:
            script.head_start(model)
        right = {"copy": [], "recall": []}
        for _ in range(12):
            names, prompt = script.draw_dense(rng, tokens, 200)
            row = script.Row()
            row.add_prompt(names, prompt)
            with torch.no_grad():
                said = model(torch.tensor([row.ids]), use_cache=False).logits[0].argmax(-1).tolist()
            for name, at, count in row.answers:
                hits = [said[at - 1 + n] == row.ids[at + n] for n in range(count)]
                right.setdefault(name, []).extend(hits)
        shares = {name: sum(right[name]) / len(right[name]) for name in ("copy", "recall")}
        assert (min(shares.values()) > 0.5) is start


def test_rows_are_full_and_know_their_answers(script, tokens):
    rng = random.Random(0)
    for longest in (128, 1024, 4096):
        row = script.make_row(rng, tokens, longest, 4096)
        assert len(row.ids) == len(row.places) == len(row.kind) == 4096
        assert row.places[0] == 0
        assert max(row.places) < longest or longest < script.SHORTEST
        marked = {i for i, kind in enumerate(row.kind) if kind == 2}
        assert marked == {at + n for _, at, count in row.answers for n in range(count)}
        assert row.answers


def test_the_tokenizer_loses_nothing_and_has_a_token_for_each_word(script):
    tokenizer = script.train_tokenizer(4096)
    for text in ["ünïcödé \t x\n\n\n    if a:\r\n", "", "\n[note] bafek 07\nfoo"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    for word in (*MARKERS, *NAMES, *NUMBERS):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    assert len(tokenizer) == script.VOCABULARY
