"""Options of what trains: flags over a YAML file, and one line for what is wrong."""

import pytest
from typer.testing import CliRunner

from bitnet_triton import training
from bitnet_triton.cli import app
from bitnet_triton.cli.arguments import WrongArgumentError
from bitnet_triton.cli.attention import parse_attention
from bitnet_triton.training import adapt as runs
from bitnet_triton.training import distill as distillation
from bitnet_triton.training import parse_setting

runner = CliRunner()
SETTINGS = ("window", "sinks", "block", "full_decode", "full_layers")


class ReachedError(Exception):
    """Carries the job that a command would have run."""


@pytest.fixture
def job(monkeypatch):
    """Return what turns a command line into its job; nothing is run."""

    def stop(job, tell):
        raise ReachedError(job)

    monkeypatch.setattr(runs, "adapt", stop)
    monkeypatch.setattr(runs, "pretrain", stop)
    monkeypatch.setattr(distillation, "distill", stop)
    monkeypatch.setattr(training, "calibrate", stop)

    def read(*arguments):
        with pytest.raises(ReachedError) as reached:
            runner.invoke(app, list(map(str, arguments)), catch_exceptions=False)
        return reached.value.args[0]

    return read


def test_flags_win_over_the_file(job, tmp_path):
    config = tmp_path / "adapt.yaml"
    config.write_text(
        "attention: sliding:window=7\nself-distill: true\nrate: 0.5\ntargets: [q_proj]\nseed: 3\n"
    )
    found = job("adapt", "--config", config, "--output", "run", "--rate", "0.25", "--full",
                "--eval-task", "recall", "--eval-task", "copy")  # fmt: skip
    assert found.attention == "sliding:window=7"
    assert (found.self_distill, found.rate, found.seed, found.lora) == (True, 0.25, 3, False)
    assert list(found.targets) == ["q_proj"]
    assert list(found.eval_tasks) == ["recall", "copy"]
    assert found.model == "recall"
    config.write_text("rate: 1e-3\n")
    assert job("adapt", "--config", config, "--output", "run").rate == 0.001
    found = job("train", "--output", "run", "--model", "tiny", "--scratch", "--seed", "0")
    assert (found.scratch, found.seed, found.model) == (True, 0, "tiny")


def test_a_distillation_is_asked_for_by_flags_and_file(job, tmp_path):
    config = tmp_path / "distill.yaml"
    config.write_text("model: dense\ndata: book.txt\nlayer: -2\ntemperature: 2\nlogits: 3\n")
    found = job("distill", "--config", config, "--output", "run", "--logits", "0", "--relations",
                "0.5", "--corpus", "text.txt", "--teacher", "large")  # fmt: skip
    assert (found.model, found.data, found.layer, found.temperature) == ("dense", "book.txt", -2, 2)
    assert (found.logits, found.relations) == (0, 0.5)
    assert (found.corpus, found.teacher, found.continued) == ("text.txt", "large", 0.25)
    with pytest.raises(WrongArgumentError, match="`model`: expected a dense model, got none"):
        runner.invoke(app, ["distill", "--output", "run"], catch_exceptions=False)
    config.write_text("question: both")
    with pytest.raises(WrongArgumentError, match="unknown option 'question'"):
        runner.invoke(
            app, ["distill", "--config", str(config), "--output", "run"], catch_exceptions=False
        )


@pytest.mark.parametrize("command", ["adapt", "train", "calibrate"])
def test_attention_in_the_file_may_be_a_mapping(command, job, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "attention:\n  prefill:\n  - mode: full\n  - {mode: sliding, window: 7}\n  decode: full\n"
    )
    wanted = {"prefill": [{"mode": "full"}, {"mode": "sliding", "window": 7}], "decode": "full"}
    found = job(command, "--config", config, "--output", "run")
    assert parse_setting(found.attention).attention == wanted
    config.write_text("attention: {mode: threshold, share: 1e-3}\n")
    found = job(command, "--config", config, "--output", "run")
    assert found.attention["share"] == 0.001
    config.write_text("attention: {}\n")
    with pytest.raises(WrongArgumentError, match="`attention`: expected a word"):
        runner.invoke(
            app, [command, "--config", str(config), "--output", "run"], catch_exceptions=False
        )


def test_attention_may_be_a_file(job, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text('{"preset": "swaa-trained", "window": 7, "full_layers": [1]}')
    found = job("adapt", "--attention", file, "--output", "run")
    wanted = {"preset": "swaa-trained", "window": 7, "full_layers": [1]}
    assert parse_setting(found.attention).attention == wanted
    assert parse_attention(str(file), **dict.fromkeys(SETTINGS)) == wanted
    for text, message in (("[1]", "it holds a list"), ("{", "plan.json: Expecting")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_setting(str(file))
        with pytest.raises(WrongArgumentError, match=message):
            parse_attention(str(file), **dict.fromkeys(SETTINGS))


def test_calibrate_reads_numbers_and_shares_of_layers(job):
    found = job("calibrate", "--output", "run", "--full-layers", "2", "--self-distill")
    assert (found.count(8), found.self_distill, found.text) == (2, True, 0.0)
    found = job("calibrate", "--output", "run", "--full-layers", "0.25")
    assert [found.count(layers) for layers in (8, 6, 1)] == [2, 2, 0]
    assert found.attention == "swaa-trained"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratee: 1", "unknown option 'ratee'; did you mean 'rate'"),
        ("rate: [", "expected a YAML file with options by name"),
        ("- rate", "which holds a list"),
        ("rate: soon", "`rate`: expected a number, got 'soon'"),
        ("", "`--output`: expected a folder"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_told_before_anything_runs(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "folder_of", None)  # no model is looked for
    config = tmp_path / "x.yaml"
    if text is not None:
        config.write_text(text)
    output = [] if text == "" else ["--output", "run"]
    with pytest.raises(WrongArgumentError, match=message):
        runner.invoke(app, ["adapt", "--config", str(config), *output], catch_exceptions=False)
