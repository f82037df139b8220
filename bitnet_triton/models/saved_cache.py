"""A cache that holds a prompt, in a safetensors file: read once, continued by other processes."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.cache import Memory
from bitnet_triton.errors import CheckpointError
from bitnet_triton.models.beside import active_adapters, own_tensors, without_wrapper
from bitnet_triton.models.bitnet.planned import build_cache
from bitnet_triton.models.rotary import bind, frequencies_of, keep_frequencies

_FORMAT = "bitnet_triton cache 2"


def save_cache(model: Any, cache: Cache, path: str | os.PathLike) -> None:
    """Write a cache, with the tables of its layers, into a file that ``load_cache`` reads.

    Args:
        model: the ``BitNetForCausalLM`` whose cache it is, with adapters of peft or without.
        cache: with layers that keep everything, all of which have seen the same tokens.
        path: of the file.

    Raises:
        ValueError: the cache is empty, or a layer drops tokens or keeps what is not told here.
    """
    model = without_wrapper(model)
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cast("list[Any]", cache.layers)):
        if not getattr(layer, "is_savable", False) or not layer.get_seq_length():
            raise ValueError(
                f"`cache`: layer {index}: expected tokens in a layer that keeps all of them, and "
                f"no more than tables or bounds beside their keys, got {type(layer).__name__}"
            )
        told = layer.saved()
        layers.append({"kind": type(layer).__name__, "tensors": sorted(told)})
        # what is shared would be refused, and files want it in one piece
        tensors |= {f"{index}.{name}": t.detach().clone() for name, t in told.items()}
    tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
    about = {
        "model": _digest_of_model(model), "attention": _attention(model), "layers": layers,
        "lengths": _lengths(cache),
    }  # fmt: skip
    text = json.dumps(about)
    metadata = {"format": _FORMAT, "about": text, "digest": _digest(tensors, text)}
    save_file(tensors, os.fspath(path), metadata=metadata)


def load_cache(model: Any, path: str | os.PathLike) -> Cache:
    """Read a cache that ``save_cache`` has written, onto the device of ``model``.

    Everything is checked before a layer is filled: a file that was made by another model, for other
    attention, or whose contents have changed is refused as a whole.

    Raises:
        CheckpointError: the file is none, is damaged, or does not fit the model or its attention.
    """
    model = without_wrapper(model)
    tensors, metadata = _read(path)
    if metadata.get("format") != _FORMAT or not {"about", "digest"} <= metadata.keys():
        raise CheckpointError(f"{path}: expected a file of `save_cache`, {_FORMAT!r}")
    if metadata["digest"] != _digest(tensors, metadata["about"]):
        raise CheckpointError(f"{path}: its contents are not those that were written")
    about = json.loads(metadata["about"])
    if about["attention"] != _attention(model):
        raise CheckpointError(
            f"{path}: expected attention {_attention(model)}, got {about['attention']}"
        )
    if about["model"] != _digest_of_model(model):
        raise CheckpointError(f"{path}: it was made by another model")
    plan: AttentionPlan | None = getattr(model, "attention_plan", None)
    cache = build_cache(plan, model.config.num_hidden_layers)
    found = [{"kind": type(layer).__name__} for layer in cache.layers]
    if found != [{"kind": layer["kind"]} for layer in about["layers"]]:
        raise CheckpointError(f"{path}: its layers are not those of the model's attention")
    parts = [
        {name: tensors[f"{index}.{name}"] for name in layer["tensors"]}
        for index, layer in enumerate(about["layers"])
    ]
    _check(parts, model, path)
    for layer, part in zip(cast("list[Memory]", cache.layers), parts):
        layer.restore({name: t.to(model.device) for name, t in part.items()})
    rotary = model.base_model.rotary_emb
    bind(rotary, cache)
    if about["lengths"] is not None:
        lengths, columns = about["lengths"]
        keep_frequencies(cache, rotary.choose(torch.tensor(lengths), columns))
    return cache


def _lengths(cache: Cache) -> tuple[list[int], int | None] | None:
    """Return for how long texts the keys are rotated, where that was chosen."""
    found = frequencies_of(cache)
    return None if found is None else (list(found.lengths), found.columns)


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file ({error})") from error


def _check(parts: list[dict[str, Tensor]], model: Any, path: str | os.PathLike) -> None:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = next((part["keys"] for part in parts if "keys" in part), None)
    B = next(iter(parts[0].values())).shape[0]
    for index, part in enumerate(parts):
        state = part.get("state")
        if state is not None and (state.dtype != torch.float32 or state.shape[:2] != (B, heads)):
            raise CheckpointError(
                f"{path}: {index}.state: expected torch.float32 [{B} {heads} D Dv], got "
                f"{state.dtype} {list(state.shape)}"
            )
        for name in ("keys", "values"):
            if like is None or name not in part:
                continue
            t = part[name]
            if t.dtype != model.dtype or t.shape != (like.shape[0], heads, like.shape[2], D):
                raise CheckpointError(
                    f"{path}: {index}.{name}: expected {model.dtype} [B {heads} T {D}], equal in "
                    f"all layers, got {t.dtype} {list(t.shape)}"
                )


def _attention(model: Any) -> Any:
    plan: AttentionPlan | None = getattr(model, "attention_plan", None)
    return None if plan is None else json.loads(json.dumps(plan.to_config()))


def _digest_of_model(model: Any) -> str:
    """Return a digest of what keys depend on: the config, and the first bytes of each tensor.

    Adapters of peft count where they are active: keys are others beside them.
    """
    config = {
        name: getattr(model.config, name, None)
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rope_parameters", "rms_norm_eps", "vocab_size", "intermediate_size",
        )
    }  # fmt: skip
    adapters = active_adapters(model.base_model)
    found = hashlib.sha256(json.dumps([config, str(model.dtype), adapters], default=str).encode())
    for _, t in sorted(own_tensors(model.base_model).items()):
        found.update(_bytes(t.detach().flatten()[:4096]))
    return found.hexdigest()


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(_bytes(t))
    return found.hexdigest()


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
