"""The examples with trl and with accelerate run in less than sixty lines, and learn."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accelerate_trains_by_the_recipe():
    losses = load("train_accelerate").main(steps=40)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.peer
def test_trl_teaches_completions(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    module = load("train_sft")
    written = module.main(str(tmp_path))
    for prompt, completion in module.PAIRS:
        assert completion.strip() in written[prompt]
