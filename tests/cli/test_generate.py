"""``bitnet-triton generate`` on the embedded model."""

import re

import pytest
import torch
from typer.testing import CliRunner

from bitnet_triton.cli import app

runner = CliRunner()
FAST = ["--backend", "reference", "--max-new-tokens", "12"]


def generate(*arguments):
    return runner.invoke(app, ["generate", *arguments, *FAST], catch_exceptions=False)


def test_writes_text_and_its_speed_apart():
    result = generate("import os\n", "--seed", "1")
    assert result.exit_code == 0
    assert result.stdout.startswith("import os\n")
    assert len(result.stdout) > len("import os\n") + 5
    assert re.search(r"prefill \d+ tokens in .* tokens/s", result.stderr)
    assert re.search(r"decode +\d+ tokens in .* tokens/s", result.stderr)


def test_equal_seeds_give_equal_text_and_others_do_not():
    first, again, other = (generate("class A", "--seed", seed).stdout for seed in "112")
    assert first == again != other


def test_greedy_decoding_is_what_transformers_gives():
    from transformers import AutoTokenizer

    import bitnet_triton as bt

    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    inputs = tokenizer("def main(", return_tensors="pt")
    with bt.use_backend("reference"), torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0], skip_special_tokens=True)
    assert generate("def main(", "--no-do-sample").stdout.rstrip("\n") == expected.rstrip("\n")


def test_reads_the_prompt_from_standard_input():
    result = runner.invoke(app, ["generate", "-", *FAST], input="x = 1\n", catch_exceptions=False)
    assert result.stdout.startswith("x = 1\n")


def first_words(*arguments):
    return generate("def main(", "--no-do-sample", *arguments).stdout


def test_attention_is_chosen_by_name_and_settings():
    full = first_words()
    assert first_words("--attention", "full") == full
    assert first_words("--attention", "sliding", "--window", "500") == full
    narrow = first_words("--attention", "sliding", "--window", "1")
    assert narrow != full
    assert first_words("--attention", '{"mode": "sliding", "window": 1}') == narrow
    everywhere = ["--attention", "swaa", "--window", "1", "--full-layers"]
    assert first_words(*everywhere, "every-1") == full
    assert first_words(*everywhere, "0,1", "--windowed-decode") != narrow


def test_a_request_to_think_stands_behind_the_text():
    assert "Think step by step" in generate("x = 1", "--think").stdout.splitlines()[2]


@pytest.mark.parametrize(
    "command", ["generate", "pack", "doctor", "bench", "adapt", "train", "distill", "longrope"]
)
def test_help_teaches(command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"bitnet-triton {command}" in result.stdout  # an example
