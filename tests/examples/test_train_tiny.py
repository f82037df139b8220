"""The training script runs, resumes and evaluates, on a few files."""

import copy
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.py"
runner = CliRunner()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CONTEXT, module.LONG_CONTEXT = 64, 128
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


def as_yarn(config, factor, length):
    config = copy.copy(config)
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": factor,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    return config


def test_windows_come_in_turns_each_out_of_one_file(script):
    files = [torch.arange(start, start + 200) for start in (0, 1000, 2000)]
    files.append(torch.arange(5000, 5100))  # too short for a long window
    windows = script.Windows(files, 40)
    starts = set()
    for number in range(len(windows)):
        rows = windows[number]["input_ids"]
        assert rows.shape == ((2, 64) if number % 2 else (1, 128))
        assert (rows.diff(dim=1) == 1).all()
        assert number % 2 or rows.max() < 5000
        starts |= set(rows[:, 0].tolist())
    assert torch.equal(windows[7]["input_ids"], script.Windows(files, 8)[7]["input_ids"])
    assert len(starts) > 20
    assert any(start >= 5000 for start in starts)


@pytest.mark.slow
def test_packed_weights_are_trained_on_with_a_longer_context(script, tmp_path):
    folder = tmp_path / "long"
    extend = ["extend", "--output", str(folder), "--no-compile", "--learning-rate", "1e-5"]
    run(script, *extend, "--steps", "1")
    run(script, *extend, "--steps", "2", "--resume")
    model = bt.BitNetForCausalLM.from_pretrained(folder)
    assert model.config.max_position_embeddings == 128
    rope = model.config.rope_parameters
    assert rope["rope_type"] == "longrope"
    assert set(rope["short_factor"]) == {1.0}
    assert rope["original_max_position_embeddings"] == 64
    yarn, _ = script.ROPE_INIT_FUNCTIONS["yarn"](as_yarn(model.config, factor=2, length=64), None)
    text = model.model.rotary_emb.choose(torch.tensor([65]))
    torch.testing.assert_close(text.inv_freq, yarn, rtol=1e-5, atol=0)
    # it knows what the packed model had learned
    losses = re.findall(r"([\d.]+) bits per byte", run(script, "evaluate", str(folder)))
    assert float(losses[0]) < 2.5
    output = run(script, "evaluate", str(folder), "--context", "64")
    assert len(re.findall(r"positions +\d+ to +\d+: [\d.]+", output)) == 8


def test_masters_made_of_packed_weights_have_their_codes_and_differ(script):
    packed = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    layers = {n: m for n, m in packed.named_modules() if hasattr(m, "ternary_weight")}
    model = script.load_masters(Path(bt.TINY_MODEL))
    masters = {n: m.weight for n, m in model.named_modules() if isinstance(m, script.BitLinear)}
    assert layers.keys() == masters.keys()
    for name, weight in masters.items():
        found, scale = script.quantize_weight(weight)
        assert torch.equal(found, layers[name].ternary_weight.codes())
        torch.testing.assert_close(found * scale, layers[name].dequantize().float())
        for code in (0, 1):
            some = weight[found == code]
            assert some.std() > 0.1 * scale


def test_bits_count_every_token_and_byte_once(script):
    tokenizer = script.AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    texts = ["def naïve(x):\n    return x\n" * 9, "import os\n"]
    bits, size = script.bits_by_position(model, tokenizer, texts, 32)
    assert size.sum() == sum(len(text.encode()) for text in texts)
    whole, _ = script.bits_by_position(model, tokenizer, texts, 512)
    ids = tokenizer(texts[1], return_tensors="pt").input_ids
    first = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    second = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    # beside padding bfloat16 rounds otherwise, and a code of an activation may be its neighbour
    assert whole.sum().item() == pytest.approx(first + second, rel=4e-3)
    assert bits.sum() > whole.sum()


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
