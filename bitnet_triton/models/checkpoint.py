"""Check a whole checkpoint against a model before the first tensor of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels.packing import has_invalid_code
from bitnet_triton.nn import PackedBitLinear


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@contextmanager
def open_checkpoint(file: Path) -> Iterator[Any]:
    """Open a safetensors file; raise CheckpointError when it is anything else, or damaged."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file.name}: expected a .safetensors file; pickled weights are never read"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: damaged or truncated ({error})") from error


def read_headers(files: Sequence[str | Path]) -> dict[str, Entry]:
    """Return the tensors of all ``files`` by name.

    Raises:
        CheckpointError: a file is damaged, or a tensor stands in two files.
    """
    entries: dict[str, Entry] = {}
    for file in map(Path, files):
        with open_checkpoint(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in entries:
                    raise CheckpointError(
                        f"{name}: stands in {entries[name].file.name} and in {file.name}"
                    )
                part = opened.get_slice(name)
                entries[name] = Entry(file, name, tuple(part.get_shape()), part.get_dtype())
    return entries


def by_model_name(model: PreTrainedModel, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Rename entries to the model's names: with or without the prefix of the base model."""
    expected = model.state_dict().keys()
    prefix = model.base_model_prefix + "."
    renamed = {}
    for name, entry in entries.items():
        forms = (name, prefix + name, name.removeprefix(prefix))
        renamed[next((form for form in forms if form in expected), name)] = entry
    return renamed


def unpacked_layers(model: PreTrainedModel, files: Sequence[str | Path]) -> list[str]:
    """Name the packed layers whose checkpoint holds one code in each number instead."""
    entries = by_model_name(model, read_headers(files))
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, PackedBitLinear)
        and (entry := entries.get(f"{name}.weight")) is not None
        and entry.shape == (layer.out_features, layer.in_features)
    ]


def check_checkpoint(model: PreTrainedModel, files: Sequence[str | Path]) -> None:
    """Compare names, shapes, dtypes, codes and scales of ``files`` with ``model``.

    Args:
        model: with its final linears, on any device, "meta" included.
        files: all files of the checkpoint.

    Raises:
        CheckpointError: naming the first tensors that do not fit and what was expected.
    """
    entries = by_model_name(model, read_headers(files))
    _check_names(model, entries)
    _check_shapes(model, entries)
    _check_values(model, entries)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _check_names(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    missing = sorted(set(state) - set(entries) - tied)
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    # a head that the base model has no use for may stand in the checkpoint
    bare = not hasattr(model, "lm_head")
    extra = sorted(
        name
        for name in set(entries) - set(state)
        if not (bare and name.startswith("lm_head.")) and not name.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise CheckpointError(f"the checkpoint holds {_some(extra)}, which the model has no use for")


def _check_shapes(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    packed = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, PackedBitLinear)
    }
    for name, tensor in model.state_dict().items():
        entry = entries.get(name)
        if entry is None:
            continue
        # scales of one element are stored as [] or [1]
        scalar = tensor.numel() == 1 and entry.shape in ((), (1,))
        if entry.shape != tuple(tensor.shape) and not scalar:
            raise CheckpointError(
                f"{entry.name}: expected shape {list(tensor.shape)}, got {list(entry.shape)}"
            )
        is_byte = tensor.dtype == torch.uint8
        if name in packed and is_byte and entry.dtype != "U8":
            raise CheckpointError(f"{entry.name}: expected packed uint8, got {entry.dtype}")
        if not is_byte and entry.dtype not in ("F64", "F32", "F16", "BF16", "I8", "U8"):
            raise CheckpointError(f"{entry.name}: expected floating point, got {entry.dtype}")
        if name not in packed and entry.dtype in ("I8", "U8"):
            raise CheckpointError(f"{entry.name}: expected floating point, got {entry.dtype}")


def _check_values(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedBitLinear)]
    for name, layer in tqdm(layers, desc="Checking weights", disable=None, leave=False):
        _check_layer(layer, entries[f"{name}.weight"], entries[f"{name}.weight_scale"])


def _check_layer(layer: nn.Module, weight: Entry, scale: Entry) -> None:
    # opened anew for each layer: a mapped file counts as memory for as long as it is open
    with open_checkpoint(weight.file) as opened:
        values = opened.get_tensor(weight.name)
        if layer.weight.dtype == torch.uint8:
            if has_invalid_code(values):
                raise CheckpointError(f"{weight.name}: holds the packed value 3, which is no code")
        elif not bool(((values == 0) | (values.abs() == 1)).all()):
            raise CheckpointError(f"{weight.name}: expected codes -1, 0 and 1")
    with open_checkpoint(scale.file) as opened:
        value = opened.get_tensor(scale.name).float()
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise CheckpointError(
                f"{scale.name}: expected a positive finite scale, got {value.flatten().tolist()}"
            )
