"""Check a whole checkpoint against a model before the first tensor of it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels.packing import has_invalid_code
from bitnet_triton.nn import PackedBitLinear

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def keeps_masters(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint with this config has trainable weights, not packed ones."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    told = found if isinstance(found, Mapping) else found.to_dict()
    return told.get("quantization_mode") == "online" and told.get("linear_class") != "bitlinear"


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def check_suffixes(files: Sequence[str | Path]) -> None:
    """Raise CheckpointError unless all ``files`` are safetensors files, by their names."""
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file.name}: expected a .safetensors file; pickled weights are never read"
            )


@contextmanager
def open_checkpoint(file: Path) -> Iterator[Any]:
    """Open a safetensors file; raise CheckpointError when it is absent, damaged or another kind."""
    check_suffixes([file])
    if not file.is_file():
        raise CheckpointError(f"{file.name}: named by the checkpoint, but not there")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: damaged or truncated ({error})") from error


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files that hold the weights of the checkpoint in ``folder``.

    Raises:
        CheckpointError: there are none, the index is damaged, or a file that it names is absent.
    """
    folder = Path(folder)
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; "
            "pickled weights are never read"
        )
    try:
        content = json.loads(index.read_text())
        names = sorted({*content["weight_map"].values()} if "metadata" in content else {})
        files = [folder / name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index.name}: damaged ({error!r})") from error
    if not files:
        raise CheckpointError(f"{index.name}: expected `metadata` and a `weight_map` with files")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name}: named in {index.name}, but not there")
    return files


def check_folder(folder: str | Path) -> None:
    """Open the weight files of a local checkpoint, so that a damaged one is named at once.

    A folder without any is left to transformers: it may hold an adapter, or a variant.

    Raises:
        CheckpointError: a file is damaged or absent, or the only weights are pickled.
    """
    present = os.listdir(folder) if os.path.isdir(folder) else []
    if SAFE_WEIGHTS_NAME in present or SAFE_WEIGHTS_INDEX_NAME in present:
        for file in weight_files(folder):
            with open_checkpoint(file):
                pass
        return
    pickled = {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    if "adapter_model.safetensors" not in present:
        pickled.add("adapter_model.bin")
    check_suffixes(sorted(pickled.intersection(present)))


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


def _how_to_add(model: PreTrainedModel, missing: Sequence[str]) -> str:
    """Say how to come by parameters of attention modes, where nothing else is missing."""
    brought = {
        f"{name}.{mode}.": mode
        for name, module in model.named_modules()
        for mode in getattr(module, "brought", ())
    }
    if not all(name.startswith(tuple(brought)) for name in missing):
        return ""
    modes = {m for start, m in brought.items() if any(n.startswith(start) for n in missing)}
    named = " and ".join(repr(mode) for mode in sorted(modes))
    return (
        f": attention {named} brings parameters of its own. Load the checkpoint without it; then "
        "`bitnet_triton.set_attention(model, ...)` adds them at their start, for training to "
        "follow, and `save_pretrained` saves them with the model"
    )


def _check_names(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    missing = sorted(set(state) - set(entries) - tied)
    if missing:
        how = _how_to_add(model, missing)
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}{how}")
    # a head that the base model has no use for may stand in the checkpoint
    bare = not hasattr(model, "lm_head")
    extra = sorted(
        name
        for name in set(entries) - set(state)
        if not (bare and name.startswith("lm_head.")) and not name.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise CheckpointError(
            f"the checkpoint holds {_some(extra)}, which the model has no use for"
        )


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
        kind: str = "floating point"
        dtypes: tuple[str, ...] = FLOATS
        if name in packed:
            is_packed = tensor.dtype == torch.uint8
            kind, dtypes = ("packed uint8", ("U8",)) if is_packed else ("codes", (*FLOATS, "I8"))
        if entry.dtype not in dtypes:
            raise CheckpointError(f"{entry.name}: expected {kind}, got {entry.dtype}")


def _check_values(model: PreTrainedModel, entries: dict[str, Entry]) -> None:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedBitLinear)]
    for name, layer in tqdm(layers, desc="Checking weights", disable=None, leave=False):
        _check_codes(entries[f"{name}.weight"], is_packed=layer.weight.dtype == torch.uint8)
        _check_scale(entries[f"{name}.weight_scale"])


def _check_codes(entry: Entry, *, is_packed: bool) -> None:
    # opened anew for each tensor: a mapped file counts as memory for as long as it is open
    with open_checkpoint(entry.file) as opened:
        values = opened.get_tensor(entry.name)
        if is_packed and has_invalid_code(values):
            raise CheckpointError(f"{entry.name}: holds the packed value 3, which is no code")
        if not is_packed and not bool(((values == 0) | (values.abs() == 1)).all()):
            raise CheckpointError(f"{entry.name}: expected codes -1, 0 and 1")


def _check_scale(entry: Entry) -> None:
    with open_checkpoint(entry.file) as opened:
        value = opened.get_tensor(entry.name).float()
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise CheckpointError(
                f"{entry.name}: expected a positive finite scale, got {value.flatten().tolist()}"
            )
