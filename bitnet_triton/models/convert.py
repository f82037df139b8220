"""Convert whole checkpoints: master weights -> packed, and back; every tensor is checked.

The target appears under its name only when it is complete. Going back cannot restore the masters
that were rounded away. It writes ``codes * scale / share`` with the share of non-zero codes: the
quantiser maps exactly these magnitudes to the same codes and, as their mean is ``scale``, to the
same scale. (Plain ``codes * scale`` would come out a third smaller.)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels import TernaryWeight, quantize_weight
from bitnet_triton.models.bitnet import BitNetConfig, BitNetForCausalLM
from bitnet_triton.models.checkpoint import (
    Entry,
    by_model_name,
    check_checkpoint,
    open_checkpoint,
    read_headers,
)
from bitnet_triton.models.quantizer import replace_linears
from bitnet_triton.nn import BitLinear, PackedBitLinear

FORMATS = ("packed", "masters")
# Everything a model needs beside its weights; pickles stay behind
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")
_NOT_COPIED = {"config.json", SAFE_WEIGHTS_INDEX_NAME, "trainer_state.json"}


@dataclass(frozen=True)
class Conversion:
    """What ``convert_checkpoint`` did.

    Attributes:
        target: the new folder.
        layers: number of ternary matrices.
        tensors: number of tensors written.
        bytes_before: size of the source's weights.
        bytes_after: size of the target's weights.
    """

    target: Path
    layers: int
    tensors: int
    bytes_before: int
    bytes_after: int


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str = "packed",
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write the checkpoint ``source`` to the new folder ``target`` in another format.

    Args:
        source: a folder, or a model on the Hub: any architecture with ``quant_method: bitnet``.
        target: a folder that does not exist, or an empty one.
        to: "packed" writes two bits a weight and a scale (``autobitlinear``, ``offline``);
            "masters" writes trainable weights (``autobitlinear``, ``online``) with the same codes.
        dtype: of the tensors that are not packed. Default: as in ``source``.

    Raises:
        ValueError: ``to`` is unknown, ``target`` holds files, or ``source`` has that format.
        CheckpointError: ``source`` is damaged or has no ternary format, or a written tensor does
            not read back as it should. No target is left behind then.
    """
    if to not in FORMATS:
        raise ValueError(f"`to`: expected one of {', '.join(FORMATS)}, got {to!r}")
    source, target = _folder(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`target`: expected a new or empty folder, got {target}, which has files")
    files = _weight_files(source)
    model = _empty_model(source)
    layers = _layers(model, to)
    check_checkpoint(model, files)
    entries = by_model_name(model, read_headers(files))
    work = _Work(layers, entries, to, dtype)
    with _new_folder(target) as partial:
        _convert_files(work, files, partial)
        _copy_rest(source, partial, to, dtype)
        check_checkpoint(_empty_model(partial), _weight_files(partial))
    return Conversion(
        target=target,
        layers=len(layers),
        tensors=len(read_headers(_weight_files(target))),
        bytes_before=sum(file.stat().st_size for file in files),
        bytes_after=sum(file.stat().st_size for file in _weight_files(target)),
    )


@dataclass(frozen=True)
class _Work:
    """What the conversion of one tensor depends on."""

    layers: dict[str, nn.Module]
    entries: dict[str, Entry]
    to: str
    dtype: torch.dtype | None

    def cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if self.dtype and value.is_floating_point() else value

    def expected(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return what the tensor ``name`` of the model becomes, by the model's names."""
        layer_name, _, kind = name.rpartition(".")
        layer = self.layers.get(layer_name)
        if layer is None or kind not in ("weight", "weight_scale"):
            return {name: self.cast(value)}
        if kind == "weight_scale":
            return {}
        if self.to == "masters":
            return {name: self.masters(layer_name, value)}
        try:
            weight = TernaryWeight.from_codes(*quantize_weight(value))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        return {name: weight.packed, f"{layer_name}.weight_scale": weight.scale}

    def ternary(self, layer_name: str, value: Tensor) -> TernaryWeight:
        """Return the packed or unpacked codes of a layer with their multiplier."""
        entry = self.entries[f"{layer_name}.weight_scale"]
        with open_checkpoint(entry.file) as opened:
            scale = opened.get_tensor(entry.name).float()
        layer = self.layers[layer_name]
        scale = scale.reciprocal() if layer.scale_divides else scale
        if value.shape[0] == layer.out_features:
            return TernaryWeight.from_codes(value.to(torch.int8), scale)
        return TernaryWeight.from_checkpoint(value, scale)

    def masters(self, layer_name: str, value: Tensor) -> Tensor:
        weight = self.ternary(layer_name, value)
        codes = weight.codes()
        share = codes.count_nonzero() / codes.numel()
        masters = codes * (weight.scale / share.clamp_min(1e-9))
        return masters.to(self.dtype or torch.bfloat16)

    def check(self, name: str, value: Tensor, written: dict[str, Tensor]) -> None:
        """Compare what was written with the source; raise CheckpointError on any difference."""
        layer_name = name.rpartition(".")[0]
        if self.to == "masters" and layer_name in self.layers and name.endswith(".weight"):
            weight = self.ternary(layer_name, value)
            codes, scale = quantize_weight(written[name])
            # the magnitude was rounded to the masters' dtype
            tolerance = torch.finfo(written[name].dtype).eps * weight.scale
            same = torch.equal(codes, weight.codes()) and bool(
                (scale - weight.scale).abs() <= tolerance + 1e-5
            )
        else:
            expected = self.expected(name, value)
            same = all(torch.equal(written[key], tensor) for key, tensor in expected.items())
        if not same:
            raise CheckpointError(f"{name}: does not read back as it was written")


def _folder(source: str | os.PathLike) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), allow_patterns=[*_COPIED, "*.safetensors"]))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; "
            "pickled weights are never read"
        )
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{name}: named in {index.name}, but not there")
    return [folder / name for name in names]


def _empty_model(folder: Path) -> PreTrainedModel:
    """Build the model of ``folder`` without memory, with its ternary linears."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        raise CheckpointError(
            f"{folder}: expected a checkpoint with `quant_method: bitnet`; rounding a dense model "
            "to ternary weights destroys it"
        )
    with torch.device("meta"):
        if config.model_type in ("bitnet", BitNetConfig.model_type):
            return BitNetForCausalLM(config)
        model = AutoModelForCausalLM.from_config(config)
        replace_linears(model, config.quantization_config)
    return model


def _layers(model: PreTrainedModel, to: str) -> dict[str, nn.Module]:
    kind = BitLinear if to == "packed" else PackedBitLinear
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, kind)
    }
    if not layers:
        raise ValueError(
            f"`source`: expected a checkpoint to convert to {to}, got one that is {to}"
        )
    return layers


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that becomes ``target`` when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_files(work: _Work, files: list[Path], partial: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    names = {(e.file, e.name): name for name, e in work.entries.items()}
    with tqdm(total=2 * len(names), desc=f"Converting to {work.to}", disable=None) as progress:
        for file in files:
            written = _write(work, file, names, partial / file.name, progress)
            _check(work, file, names, partial / file.name, progress)
            weight_map |= dict.fromkeys(written, file.name)
            total += sum(tensor.nbytes for tensor in written.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(
    file: Path, names: dict[tuple[Path, str], str], progress: tqdm
) -> Iterator[tuple[str, Tensor]]:
    with open_checkpoint(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            yield names[file, name], opened.get_tensor(name)
            progress.update()


def _write(work: _Work, file: Path, names: dict, target: Path, progress: tqdm) -> dict[str, Tensor]:
    written: dict[str, Tensor] = {}
    for name, value in _tensors(file, names, progress):
        written |= work.expected(name, value)
    save_file({k: v.contiguous() for k, v in written.items()}, target, metadata={"format": "pt"})
    return written


def _check(work: _Work, file: Path, names: dict, target: Path, progress: tqdm) -> None:
    with open_checkpoint(target) as opened:
        written = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, value in _tensors(file, names, progress):
            work.check(name, value, written)


def _copy_rest(source: Path, partial: Path, to: str, dtype: torch.dtype | None) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _NOT_COPIED:
                shutil.copy(file, partial)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline" if to == "packed" else "online",
    }
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
