"""The table of converted models: its plans read an eighth, and it compares prompt by prompt."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.training.footprint import measure_footprint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(
        "converted_table", EXAMPLES / "converted_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("convert_sparse", None)
    return module


@pytest.mark.parametrize("row", ["pooled_blocks", "indexed_blocks", "quest"])
def test_an_eighth_is_read(script, row):
    length = 512
    layers = script.layers_of(row, length)
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, fuse=False).eval()
    bt.set_attention(model, {"prefill": layers, "decode": layers})
    ids = torch.randint(1, model.config.vocab_size, (1, length))
    found = measure_footprint(model, ids, None)
    # a block that the text ends in is shorter, by less than its size
    for rows in (found.rows_prompt, found.rows_decode):
        assert length / 8 - 4 < rows <= length / 8


def test_differences_are_those_of_the_same_prompts(script, tmp_path):
    lines = [
        {"kind": "footprint"},
        {"answers": [{"prompt": 2, "score": 1.0}, {"prompt": 0, "score": 0.5}]},
        {"answers": [{"prompt": 1, "score": 0.0}, {"prompt": 1, "score": 1.0}]},
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = script.prompt_scores(tmp_path)
    assert scores == [50, 50, 100]
    found = script.compare(scores, [100, 50, 50])  # differences -50, 0, 50
    assert found == {"mean": 66.7, "minus_dense": 0, "half_interval": 48, "n": 3}
    same = script.compare([100.0] * 200, [100.0] * 200)  # what none of 200 shows
    assert same == {"mean": 100, "minus_dense": 0, "half_interval": 1.0, "n": 200}
    with pytest.raises(ValueError, match="zip"):
        script.compare(scores, [100, 50])
