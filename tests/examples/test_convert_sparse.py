"""The script that gives a dense model an index trains nothing else, and saves what was learned."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import bitnet_triton as bt

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("convert_sparse", EXAMPLES / "convert_sparse.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convert_sparse", module)
    spec.loader.exec_module(module)
    return module


def test_the_index_alone_changes(script, tmp_path, capsys):
    script.convert(
        output=tmp_path, model=Path(bt.RECALL_MODEL), block=16, selected=4, length=128,
        dense_rows=2, selected_rows=1, rate=5e-3, seed=0,
    )  # fmt: skip
    assert "dense: 256 tokens" in capsys.readouterr().out
    model = bt.BitNetForCausalLM.from_pretrained(tmp_path, fuse=False)
    assert model.config.attention["mode"] == "indexed_blocks"
    start = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, fuse=False)
    bt.set_attention(start, model.config.attention)
    before = start.state_dict()
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == (".indexed_blocks." not in name), name
