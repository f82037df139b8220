"""The training script runs, resumes and evaluates, on a few files."""

import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.py"
runner = CliRunner()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CONTEXT = 64
    return module


def run(script, *arguments):
    with bt.use_backend("reference"):
        result = runner.invoke(script.app, [*arguments, "--files", "6"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_trains_resumes_and_evaluates(script, tmp_path):
    folder = tmp_path / "tiny"
    train = ["train", "--output", str(folder), "--no-compile", "--batch-size", "2"]
    run(script, *train, "--steps", "2")
    assert (folder / "checkpoint-2").is_dir()
    run(script, *train, "--steps", "3", "--resume")
    state = (folder / "checkpoint-3" / "trainer_state.json").read_text()
    assert '"global_step": 3' in state

    bt.BitNetForCausalLM.from_pretrained(folder)
    (loss,) = re.findall(r"([\d.]+) bits per byte on 6", run(script, "evaluate", str(folder)))
    assert 2 < float(loss) < 12  # three steps learn little; a guess is 12 bits a token


def test_the_held_out_files_are_never_trained_on(script):
    trained, held_out = (script.read_texts(held_out=part, files=None) for part in (False, True))
    assert not set(trained) & {text for text in held_out if len(text) > 500}
    assert len(held_out) < 0.1 * len(trained)


def test_the_tokenizer_loses_nothing(script):
    texts = script.read_texts(held_out=False, files=20)
    tokenizer = script.train_tokenizer(texts)
    for text in [*texts[:5], "ünïcödé \t x\n\n\n    if a:\r\n", ""]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
