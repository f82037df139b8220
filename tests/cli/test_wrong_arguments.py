"""Whatever a user gets wrong is one line that names the argument, before a model is loaded."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import bitnet_triton as bt
from bitnet_triton.attention.registry import MODES
from bitnet_triton.attention.swaa import PRESETS
from bitnet_triton.cli import main
from bitnet_triton.cli.attention import HELP
from bitnet_triton.cli.bench import load_benchmarks

BIG = "9" * 30


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; no model may be loaded."""

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    def run(*arguments):
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
        monkeypatch.setattr("sys.argv", ["bitnet-triton", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run


def is_refused(result, *parts, code=2):
    assert result[0] == code, result
    lines = result[2].splitlines()
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]
    return True


@pytest.mark.parametrize(
    ("option", "wanted", "values"),
    [
        ("--max-new-tokens", "an integer of at least 1", ["0", "-1", "x", "1.5", "nan", BIG]),
        ("--temperature", "a number above 0", ["0", "-1", "nan", "inf", "x", ""]),
        ("--top-p", "a number above 0 and up to 1", ["0", "2", "-1", "nan", "inf", "x"]),
        ("--min-p", "a number of at least 0 and up to 1", ["2", "-1", "nan", "x"]),
        ("--top-k", "an integer of at least 1", ["0", "-1", "1.5", "x", BIG]),
        ("--repetition-penalty", "a number above 0", ["0", "-1", "nan", "inf", "x"]),
        ("--seed", "an integer of at least 0", ["-1", "1.5", "x", BIG]),
        ("--threads", "an integer of at least 1", ["0", "-1", "x", "100000"]),
        ("--window", "an integer of at least 1", ["0", "-1", "x", "1e3", BIG]),
        ("--sinks", "an integer of at least 0", ["-1", "x", BIG]),
        ("--block", "an integer of at least 1", ["0", "x", BIG]),
    ],
)
def test_numbers_out_of_range(run, option, wanted, values):
    for value in values:
        got = repr(value)
        is_refused(run("generate", "x", option, value), f"`{option}`: expected {wanted}", got)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "'--dtype'"),
        (["--dtype", "float64"], "'float32', 'bfloat16', 'float16'"),
        (["--backend", "cuda"], "'triton', 'compile', 'reference', 'triton-cpu'"),
        (["--backend", "triton-cpu"], "triton-cpu is not installed"),
        (["--device", "tpu"], "`--device`: expected `cpu`"),
        (["--device", ""], "`--device`: expected `cpu`"),
        (["--device", "meta"], "got 'meta'"),
        (["--device", "cuda:99"], "got 'cuda:99'"),
        (["--top-p", "0.5", "--no-do-sample"], "`--top-p`: expected sampling"),
        (["--chat"], "`--chat`: expected a model with a chat template"),
        (["--nonsense"], "No such option: --nonsense"),
        (["y"], "unexpected extra argument"),
        (["--window", "4"], "`--window`: expected `--attention` beside it"),
        (["--full-decode"], "`--full-decode/--windowed-decode`: expected `--attention` beside it"),
        (["--full-layers", "odd"], "`--full-layers`: expected `--attention` beside it"),
        (["--attention", "slidng"], "did you mean 'sliding'?"),
        (["--attention", "sliding"], "the setting 'window' is missing"),
        (["--attention", "sliding:window"], "`--attention`: expected window=value in"),
        (["--attention", "sliding:window=0"], "'window': expected at least 1, got 0"),
        (["--attention", "full", "--window", "4"], "setting of mode 'full' out of: none; got"),
        (["--attention", ""], "`--attention`: expected a mode"),
        (["--attention", "{"], "`--attention`: expected JSON"),
        (["--attention", "{}"], "`--attention`: expected a mode"),
        (["--attention", '{"mode": "top_k", "keys": 0}'], "'keys': expected at least 1, got 0"),
        (["--attention", '{"mode": "threshold", "share": NaN}'], "'share': expected more than 0"),
        (["--attention", '{"prefill": "full"}'], "expected the phases 'prefill' and 'decode'"),
        (["--attention", "swaa", "--full-layers", "99"], "expected layers below"),
        (["--attention", "swaa", "--full-layers", "1,,5"], "`--full-layers`: expected `odd`"),
        (["--attention", "swaa", "--full-layers", ""], "`--full-layers`: expected `odd`"),
    ],
    ids=" ".join,
)
def test_words_that_mean_nothing(run, arguments, message):
    is_refused(run("generate", "x", *arguments), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_where_there_is_none(run):
    is_refused(
        run("generate", "x", "--device", "cuda"), "`--device`: expected `cpu`: torch finds no"
    )


def test_a_backend_that_the_environment_forces(run, monkeypatch):
    monkeypatch.setenv("BITNET_TRITON_BACKEND", "nonsense")
    for command in (["generate", "x"], ["doctor"]):
        is_refused(run(*command), "BITNET_TRITON_BACKEND: expected one of", "got 'nonsense'")
    monkeypatch.setenv("BITNET_TRITON_BACKEND", "triton-cpu")
    is_refused(run("generate", "x"), "BITNET_TRITON_BACKEND", "triton-cpu is not installed")


def test_a_prompt_without_text(run, monkeypatch):
    is_refused(run("generate", ""), "`PROMPT`: expected text, got none")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    is_refused(run("generate", "-"), "`PROMPT`: expected text on standard input, got none")
    monkeypatch.setattr("sys.stdin", None)
    is_refused(run("generate", "-"), "standard input, which is closed")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    is_refused(run("generate", "-"), "expected text in utf-8", "byte 0xff at 2")
    is_refused(run("generate", "a\udcff"), "`PROMPT`: expected UTF-8")


def folder_with(path, **changes):
    """Copy the embedded model; None removes a file, a dict changes its JSON, else its content."""
    shutil.copytree(bt.TINY_MODEL, path)
    for name, change in changes.items():
        file = path / name.replace("__", ".")
        if isinstance(change, dict):
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        else:
            file.unlink()
            if change is not None:
                file.write_bytes(change)
    return path


WEIGHTS = (Path(bt.TINY_MODEL) / "model.safetensors").read_bytes()
DAMAGED = {
    "no config": ({"config__json": None}, 2, "expected a folder with a config.json"),
    "broken JSON": ({"config__json": b"{"}, 2, "cannot read"),
    "no object": ({"config__json": b"[]"}, 2, "expected a JSON object, got list"),
    "an empty config": ({"config__json": b"{}"}, 1, "Unrecognized model"),
    "no UTF-8": ({"config__json": b"\xff\xfe"}, 2, "cannot read"),
    "an unknown architecture": ({"config__json": {"model_type": "nonsense"}}, 1, "`nonsense`"),
    "a wrong type": ({"config__json": {"hidden_size": "x"}}, 1, "'hidden_size'"),
    "another quantisation": (
        {"config__json": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, 2,
        "expected 'bitnet', got 'gptq'",
    ),
    "no quantisation": ({"config__json": {"quantization_config": None}}, 2, "a dense BitNet"),
    "1bitLLM": (
        {
            "config__json": {
                "model_type": "llama", "quantization_config": None, "weight_bits": 1,
            }
        },
        2, "a ternary checkpoint of 1bitLLM",
    ),
    "odd quantisation": ({"config__json": {"quantization_config": "x"}}, 2, "got str"),
    "truncated weights": ({"model__safetensors": WEIGHTS[:100_000]}, 1, "damaged or truncated"),
    "empty weights": ({"model__safetensors": b""}, 1, "damaged or truncated"),
    "no weights": ({"model__safetensors": None}, 1, "expected model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_checkpoint_that_is_damaged(run, tmp_path, what):
    changes, code, message = DAMAGED[what]
    folder = folder_with(tmp_path / "model", **changes)
    generated = run("generate", "x", "--model", folder)
    assert is_refused(generated, "`--model`: ", str(folder), message, code=code)
    packed = run("pack", folder, tmp_path / "new", "--to", "masters")
    assert is_refused(packed, "`SOURCE`: ", str(folder), message, code=code)
    assert sorted(tmp_path.iterdir()) == [folder]  # nothing is left behind


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"tokenizer__json": None, "tokenizer_config__json": None}, 2, "a folder with a tokenizer"),
        ({"tokenizer__json": b"{"}, 1, "cannot load"),
        ({"tokenizer_config__json": b"["}, 1, "cannot load"),
    ],
)
def test_a_tokenizer_that_is_damaged(run, tmp_path, changes, code, message):
    folder = folder_with(tmp_path / "model", **changes)
    is_refused(run("generate", "x", "--model", folder), "`--model`: ", message, code=code)


def test_what_is_no_folder_with_a_model(run, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    cases = {
        "": "there is no such folder",
        "nonsense": "there is no such folder",
        "./nonsense": "there is no such folder",
        "a b": "there is no such folder",
        "one/two/three": "there is no such folder",
        tmp_path / "nonsense": "there is no such folder",
        tmp_path / "model.gguf": "a GGUF file, a format that is not read here",
        Path(bt.TINY_MODEL) / "config.json": "a file",
        tmp_path / "gone": "a link to nothing",
        tmp_path: "only GGUF, which is not read here",
        adapter: "an adapter without its model",
    }
    for model, message in cases.items():
        is_refused(run("generate", "x", "--model", model), "`--model`: expected a folder", message)
        is_refused(run("pack", model, "new"), "`SOURCE`: expected a folder", message)


def test_a_path_that_has_lost_its_end_is_not_looked_for_on_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    is_refused(run("generate", "x", "--model", "runs/nonsense"), "there is no such folder")


def test_a_name_that_the_hub_does_not_give(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("generate", "x", "--model", "nobody/nothing")
    is_refused(result, "`--model`: no folder 'nobody/nothing' here, and the Hub", code=1)


def test_where_nothing_can_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    for target in (full, tmp_path / "file", tmp_path / "file" / "below"):
        is_refused(run("pack", "tiny", target, "--to", "masters"), "`TARGET`: expected")
    is_refused(run("pack", "tiny", tmp_path / "new"), "`SOURCE`: expected a checkpoint to convert")
    is_refused(run("pack", "tiny"), "Missing argument 'TARGET'")
    is_refused(run("pack", "tiny", "x", "--to", "gguf"), "'packed', 'masters'")
    is_refused(run("pack", "tiny", "x", "--dtype", "int8"), "'float32', 'bfloat16', 'float16'")


def test_a_plan_for_another_architecture(run, tmp_path):
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    folder = folder_with(tmp_path / "model", config__json=changes)
    result = run("generate", "x", "--model", folder, "--attention", "full")
    is_refused(result, "`--attention`: expected a model of type bitnet, got one of type llama")


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage: bitnet-triton" in out


def test_every_mode_and_preset_stands_in_the_help():
    for name in (*MODES, *PRESETS):
        assert f"`{name}`" in HELP


def test_the_help_of_bench_needs_no_checkout(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bt, "__file__", str(tmp_path / "site-packages" / "bitnet_triton" / "x.py"))
    for arguments in (["--help"], ["ternary_linear", "--help"], []):
        code, out, err = run("bench", *arguments)
        assert (code, err) == (0, "")
        assert "bitnet-triton bench ternary_linear" in out
    is_refused(run("bench", "ternary_linear"), "benchmarks come with the source", code=1)
    with pytest.raises(FileNotFoundError):
        load_benchmarks(tmp_path)


def start(*arguments, **options):
    code = "from bitnet_triton.cli import main; main()"
    environment = {**os.environ, "BITNET_TRITON_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options,
    )  # fmt: skip


def test_a_reader_that_leaves_and_a_key_that_stops():
    """Both in the middle of a text: no traceback."""
    left = start("generate", "a = 1\nb = 2\n", "--max-new-tokens", "100000")
    stopped = start("generate", "a = 1\nb = 2\n", "--max-new-tokens", "100000")
    assert left.stdout.readline() == "a = 1\n"
    left.stdout.close()
    assert stopped.stdout.readline() == "a = 1\n"
    stopped.send_signal(signal.SIGINT)
    for process, code in ((left, 1), (stopped, 130)):
        with process:
            error = process.stderr.read()
            assert process.wait(60) == code
            assert "Traceback" not in error
            assert "Exception ignored" not in error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--attention", "slidin", "`--attention`: expected a mode out of"),
        ("--attention", "sliding:window", "`--attention`: expected window=value"),
        ("--attention", "missing.json", "`--attention`: expected a file with an object as JSON"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "x"), ("eval",)])
def test_commands_name_an_attention_in_the_same_words(run, command, option, value, message):
    is_refused(run(*command, option, value), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "h2o:budget=0"], "`--cache`: 'budget': expected at least 1, got 0"),
        (["--rope", "nope:factor=4"], "`--rope`: expected one of"),
        (["--model", "nowhere"], "`--model`: expected a folder, or a model on the Hub"),
    ],
)
def test_eval_names_its_options(run, options, message):
    is_refused(run("eval", *options), message)


def test_eval_writes_to_a_folder(run, tmp_path):
    (tmp_path / "file").touch()
    result = run("eval", "--output", tmp_path / "file")
    is_refused(result, "`--output`: expected a folder, got", ", a file")
