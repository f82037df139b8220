"""The model that is measured, as a folder: a checkpoint, a model on the Hub, or one in memory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from bitnet_triton.assets import embedded
from bitnet_triton.models import BitNetForCausalLM

_READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


@contextmanager
def folder_of(model: Any) -> Iterator[str]:
    """Yield a folder with a model and its tokenizer.

    Each setting is loaded from there, so a model in memory stays as it is: it is written to a
    folder that exists as long as the block runs.

    Args:
        model: a folder, a name on the Hub, that of an embedded model, or a ``BitNetForCausalLM``.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: there is no such folder or model, or where a model in memory comes from there is
            no tokenizer.
    """
    if isinstance(model, nn.Module):
        if not isinstance(model, BitNetForCausalLM):
            raise TypeError(
                "`model`: expected a BitNetForCausalLM, a folder or a name on the Hub, got "
                f"{type(model).__name__}"
            )
        tokenizer = _tokenizer(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            yield folder
        return
    if not isinstance(model, (str, os.PathLike)):
        got = type(model).__name__
        raise TypeError(f"`model`: expected a model, a folder or a name, got {got}")
    yield _downloaded(embedded(model) if isinstance(model, str) else os.fspath(model))


def _downloaded(name: str) -> str:
    if Path(name).is_dir():
        return name
    try:
        return snapshot_download(name, allow_patterns=list(_READ))
    except (OSError, ValueError) as error:  # no such name, no network, no name at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"`model`: expected a folder with a model or a name on the Hub, got {name} ({reason})"
        ) from error


def _tokenizer(model: PreTrainedModel) -> Any:
    origin = model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model`: no tokenizer was found at {origin!r}, where it comes from; save both to a "
            "folder, and pass that"
        ) from error


def digest(folder: str) -> str:
    """Return a hash of a folder's weights, config and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]
