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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels import TernaryWeight, quantize_weight
from bitnet_triton.models.bitnet import BitNetConfig, BitNetForCausalLM
from bitnet_triton.models.checkpoint import (
    Entry,
    by_model_name,
    check_checkpoint,
    open_checkpoint,
    read_headers,
    weight_files,
)
from bitnet_triton.models.onebit import config_objection
from bitnet_triton.models.quantizer import in_memory, replace_linears
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
        dtype: of the tensors that are not packed. Default: as in ``source``; masters have that of
            its embeddings.

    Raises:
        ValueError: ``to`` is unknown, ``target`` holds files, or ``source`` has that format.
        CheckpointError: ``source`` is damaged or has no ternary format, or a written tensor does
            not read back as it should. No target is left behind then.
    """
    if to not in FORMATS:
        raise ValueError(f"`to`: expected one of {', '.join(FORMATS)}, got {to!r}")
    before, target = _Checkpoint(_folder(source)), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`target`: expected a new or empty folder, got {target}, which has files")
    kind = BitLinear if to == "packed" else PackedBitLinear
    if not any(isinstance(layer, kind) for layer in before.layers.values()):
        raise ValueError(
            f"`source`: expected a checkpoint to convert to {to}, got one that is {to}"
        )
    with _new_folder(target) as partial:
        _write(before, partial, to, dtype)
        _copy_rest(before.folder, partial, to, dtype)
        after = _Checkpoint(partial)
        _compare(before, after, dtype)
        return Conversion(
            target=target,
            layers=len(after.layers),
            tensors=len(after.entries),
            bytes_before=sum(file.stat().st_size for file in before.files),
            bytes_after=sum(file.stat().st_size for file in after.files),
        )


@dataclass(frozen=True)
class _Ternary:
    """What a ternary linear computes with, whatever the format it was read from."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


class _Checkpoint:
    """A checkpoint on disk whose names, shapes, codes and scales are known to be right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        model = _empty_model(folder)
        check_checkpoint(model, self.files)
        self.entries: dict[str, Entry] = by_model_name(model, read_headers(self.files))
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (BitLinear, PackedBitLinear))
        }

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        with open_checkpoint(entry.file) as opened:
            return opened.get_tensor(entry.name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings, which is that of the model."""
        name = next(name for name in self.entries if name.endswith("embed_tokens.weight"))
        return self.read(name).dtype

    def layer_of(self, name: str) -> str | None:
        """Return the ternary linear that owns the tensor ``name``, a norm inside it excepted."""
        owner = name.rpartition(".")[0]
        return owner if owner in self.layers else None

    def ternary(self, name: str) -> _Ternary:
        """Read the ternary linear ``name``; autobitlinear multiplies its bias by the scale too."""
        layer, weight = self.layers[name], self.read(f"{name}.weight")
        bias = self.read(f"{name}.bias").float() if f"{name}.bias" in self.entries else None
        if isinstance(layer, BitLinear):
            try:
                return _Ternary(*quantize_weight(weight), bias)
            except ValueError as error:
                raise CheckpointError(f"{name}.weight: {error}") from error
        scale = self.read(f"{name}.weight_scale").float().reshape(1)
        is_packed = weight.shape[0] != layer.out_features
        codes = TernaryWeight(weight, scale).codes() if is_packed else weight.to(torch.int8)
        if layer.scale_divides:
            return _Ternary(codes, scale.reciprocal(), bias)
        return _Ternary(codes, scale, None if bias is None else bias * scale)


def _encode(
    ternary: _Ternary, to: str, dtype: torch.dtype | None, own: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a linear; ``own`` is the dtype of masters where ``dtype`` is None."""
    if to == "packed":
        weight = TernaryWeight.from_codes(ternary.codes, ternary.scale)
        tensors = {"weight": weight.packed, "weight_scale": weight.scale}
        bias = None if ternary.bias is None else ternary.bias / ternary.scale
    else:
        tensors, bias = {"weight": _masters(ternary, dtype or own)}, ternary.bias
    return tensors if bias is None else {**tensors, "bias": bias.to(dtype or torch.float32)}


def _masters(ternary: _Ternary, dtype: torch.dtype) -> Tensor:
    """Return weights that the quantiser maps to these codes and this scale.

    No one number of few bits has the right mean: of the two next to it, one stands in as many
    places as make the mean right.
    """
    codes = ternary.codes
    nonzero = codes.flatten().nonzero().flatten()
    if not len(nonzero):
        return codes.to(dtype)
    magnitude = ternary.scale.double().item() * codes.numel() / len(nonzero)
    near = torch.tensor(magnitude, dtype=torch.float64).to(dtype)
    away = torch.inf if near.double() < magnitude else 0.0
    other = torch.nextafter(near, torch.tensor(away, dtype=dtype))
    step = other.double().item() - near.double().item()
    others = round((magnitude - near.double().item()) / step * len(nonzero))
    masters = codes.to(dtype) * near
    flat = masters.view(-1)
    places = nonzero[:others]
    flat[places] = flat[places].sign() * other
    return masters


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype and value.is_floating_point() else value


def _converted(
    before: _Checkpoint, name: str, to: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return what the tensor ``name`` becomes; a ternary linear stands where its weight stood."""
    layer = before.layer_of(name)
    if layer is None:
        return {name: _cast(before.read(name), dtype)}
    if not name.endswith(".weight"):
        return {}
    encoded = _encode(before.ternary(layer), to, dtype, before.dtype)
    return {f"{layer}.{kind}": value.contiguous() for kind, value in encoded.items()}


def _write(before: _Checkpoint, partial: Path, to: str, dtype: torch.dtype | None) -> None:
    """Write one file for each file of the source, and an index when there are several."""
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(total=len(before.entries), desc=f"Converting to {to}", disable=None) as progress:
        for file in before.files:
            tensors: dict[str, Tensor] = {}
            for name in [name for name, entry in before.entries.items() if entry.file == file]:
                tensors |= _converted(before, name, to, dtype)
                progress.update()
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(before.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _compare(before: _Checkpoint, after: _Checkpoint, dtype: torch.dtype | None) -> None:
    """Read every tensor back; raise CheckpointError for the first that is not what it should be."""
    plain = {name for name in before.entries if before.layer_of(name) is None}
    names = sorted(plain | set(before.layers))
    for name in tqdm(names, desc="Checking", disable=None):
        if name in plain:
            same = torch.equal(after.read(name), _cast(before.read(name), dtype))
        else:
            same = _same(before.ternary(name), after.ternary(name), dtype)
        if not same:
            raise CheckpointError(f"{name}: does not read back as it was written")


def _same(before: _Ternary, after: _Ternary, dtype: torch.dtype | None) -> bool:
    """Compare codes exactly, scales up to the error of a mean, biases up to a rounding."""
    rounding = torch.finfo(dtype or torch.bfloat16).eps
    if before.bias is None or after.bias is None:
        same_bias = before.bias is after.bias
    else:
        same_bias = torch.allclose(before.bias, after.bias, rtol=max(rounding, 1e-6), atol=1e-30)
    # masters have the right mean up to one step of one of them; a matrix of zeros has no scale to
    # speak of: the quantiser's smallest one
    count = int(before.codes.count_nonzero())
    close = max(rounding / max(count, 1), 4e-6)
    same_scale = not count or torch.allclose(before.scale, after.scale, rtol=close, atol=1e-30)
    return torch.equal(before.codes, after.codes) and same_scale and same_bias


def _folder(source: str | os.PathLike) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), allow_patterns=[*_COPIED, "*.safetensors"]))


def _empty_model(folder: Path) -> PreTrainedModel:
    """Build the model of ``folder`` without memory, with its ternary linears."""
    config = AutoConfig.from_pretrained(folder)
    objection = config_objection(config)
    if objection is not None:
        raise CheckpointError(f"{folder}: {objection}")
    if getattr(config, "quantization_config", None) is None:
        raise CheckpointError(
            f"{folder}: expected a checkpoint with `quant_method: bitnet`; rounding a dense model "
            "to ternary weights destroys it"
        )
    with torch.device("meta"):
        if config.model_type in ("bitnet", BitNetConfig.model_type):
            return BitNetForCausalLM(config)
        model = AutoModelForCausalLM.from_config(config)
        replace_linears(model, in_memory(config.quantization_config))
    return model


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that becomes ``target`` when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        for path in (partial, *partial.iterdir()):  # temporary folders and their files are private
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
