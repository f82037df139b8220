"""Find the checkpoint that an argument names, and say what is wrong with it before it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnet_triton.assets import MODELS, embedded
from bitnet_triton.cli.arguments import WrongArgumentError
from bitnet_triton.errors import CheckpointError

DEFAULT = "tiny"  # of the commands that write
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "tekken.json",
)  # fmt: skip


def find_checkpoint(name: str, argument: str, *, tokenizer: bool = False) -> str:
    """Return the folder that ``name`` means, or ``name`` itself where it may be one of the Hub.

    Args:
        name: a folder, a model on the Hub, or the name of an embedded model.
        argument: the name of the argument, for messages.
        tokenizer: whether the folder has to hold one.

    Raises:
        WrongArgumentError: it is neither, or the folder holds no checkpoint.
    """
    if name in MODELS:
        return embedded(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        _check_folder(Path(path), argument, tokenizer)
        return path
    wanted = f"`{argument}`: expected a folder, or a model on the Hub as `owner/name`, got"
    if os.path.lexists(path):
        is_gguf = path.lower().endswith(".gguf")
        what = "a file" if os.path.exists(path) else "a link to nothing"
        what = "a GGUF file, a format that is not read here" if is_gguf else what
        raise WrongArgumentError(f"{wanted} {name!r}, {what}")
    if not _may_be_on_the_hub(name):
        raise WrongArgumentError(f"{wanted} {name!r}: there is no such folder")
    return name


def _may_be_on_the_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, slash, _ = name.partition("/")
    if not slash or os.path.isdir(owner):  # a folder's name, a path that has lost its end
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_folder(folder: Path, argument: str, tokenizer: bool) -> None:
    wanted = f"`{argument}`: expected a folder with"
    names = sorted(os.listdir(folder))
    if "config.json" not in names:
        gguf = any(name.lower().endswith(".gguf") for name in names)
        has = "only GGUF, which is not read here" if gguf else "none"
        has = "an adapter without its model" if "adapter_config.json" in names else has
        raise WrongArgumentError(f"{wanted} a config.json, got {str(folder)!r}, which has {has}")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise WrongArgumentError(
            f"`{argument}`: cannot read {file}: {first_line(error)}"
        ) from error
    if not isinstance(config, dict):
        got = type(config).__name__
        raise WrongArgumentError(f"`{argument}`: {file}: expected a JSON object, got {got}")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        got = type(quantization).__name__
        raise WrongArgumentError(
            f"`{argument}`: {file}: `quantization_config`: expected a JSON object, got {got}"
        )
    method = quantization.get("quant_method", "bitnet")
    if method not in ("bitnet", "bitnet_triton"):
        raise WrongArgumentError(
            f"`{argument}`: {file}: `quant_method`: expected 'bitnet', got {method!r}"
        )
    if tokenizer and not set(_TOKENIZERS) & set(names):
        raise WrongArgumentError(
            f"{wanted} a tokenizer, got {str(folder)!r}, which has none of {', '.join(_TOKENIZERS)}"
        )


def read_config(found: str, name: str, argument: str) -> Any:
    """Return the config of a checkpoint that has ternary layers and whose files can be opened.

    Raises:
        WrongArgumentError: it is a dense model.
        CheckpointError: the config cannot be read, or weights are absent, damaged or pickled.
    """
    from transformers import AutoConfig

    import bitnet_triton.models  # noqa: F401 - registers our model types
    from bitnet_triton.models.checkpoint import open_checkpoint, weight_files
    from bitnet_triton.models.onebit import config_objection

    with one_line(name, argument):
        config = AutoConfig.from_pretrained(found)
    objection = config_objection(config)
    if objection is not None:
        raise WrongArgumentError(f"`{argument}`: {name}: {objection}")
    if not getattr(config, "quantization_config", None):
        kind = (config.architectures or [config.model_type])[0]
        raise WrongArgumentError(
            f"`{argument}`: expected a checkpoint with `quant_method: bitnet`, got {name}, "
            f"a dense {kind}"
        )
    if os.path.isdir(found):
        with one_line(name, argument):
            for file in weight_files(found):
                with open_checkpoint(file):
                    pass
    return config


@contextmanager
def one_line(name: str, argument: str) -> Iterator[None]:
    """Turn whatever a library says about a checkpoint into one line that names the argument."""
    try:
        yield
    except (WrongArgumentError, MemoryError):
        raise
    except CheckpointError as error:
        text = str(error)
        if text.startswith(f"`{argument}`"):
            raise
        where = "" if text.startswith(name) else f"{name}: "
        raise CheckpointError(f"`{argument}`: {where}{text}") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if os.path.isdir(name) or name in MODELS:
            where = f"cannot load {name!r}"
        else:
            where = f"no folder {name!r} here, and the Hub does not give it"
        raise CheckpointError(f"`{argument}`: {where}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error and what it announces; its type where it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
