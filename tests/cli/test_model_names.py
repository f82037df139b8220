"""An embedded model has the same name in every command."""

import pytest
from transformers import PreTrainedConfig
from typer.testing import CliRunner

from bitnet_triton.assets import MODELS
from bitnet_triton.cli import app
from bitnet_triton.training.subject import folder_of

OUTPUT, TEXT = ("--output", "{folder}/run"), "{folder}/text.txt"
COMMANDS = [
    ("generate", "x", "--model", "{name}"),
    ("serve", "{name}"),
    ("pack", "{name}", "{folder}/packed"),
    ("eval", "--model", "{name}"),
    ("adapt", "--model", "{name}", *OUTPUT),
    ("train", "--model", "{name}", *OUTPUT),
    ("calibrate", "--model", "{name}", *OUTPUT),
    ("longrope", "--model", "{name}", "--text", TEXT, *OUTPUT),
    ("distill", "--model", "{name}", "--data", TEXT, *OUTPUT),
]


class Reached(BaseException):
    """Carries the place that a config is read from; no command may take it for an error."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_finds_every_embedded_model(command, tmp_path, monkeypatch):
    def stop(cls, place, *_, **__):
        raise Reached(str(place))

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(stop))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a red fox")
    for name, folder in MODELS.items():
        (tmp_path / name).mkdir(exist_ok=True)  # is meant by ./name
        line = [part.format(name=name, folder=tmp_path) for part in command]
        with pytest.raises(Reached) as reached:
            CliRunner().invoke(app, line, catch_exceptions=False)
        assert reached.value.args == (str(folder),)


def test_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for path in ("./tiny", tmp_path / "tiny"):
        with folder_of(path) as folder:
            assert folder == str(path)
