"""Adapters of peft beside the linears of a model: what keys depend on, and what is the model's own.

peft is not imported: its layers are known by what they have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def without_wrapper(model: Any) -> Any:
    """Return the model that a ``PeftModel`` stands around, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and modules of the layers that peft has put beside those of a model."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            yield name, module


def content(module: Any, active: tuple[str, ...]) -> tuple[tuple[float, ...], str]:
    """Return what tells adapters of one name apart: their scales, and a digest of their bytes.

    Sums would differ by the number of threads and the device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if set(name.split(".")) & set(active):
            t = parameter.detach().contiguous().cpu().view(-1)
            digest.update(name.encode() + t.view(torch.uint8).numpy().tobytes())
    scales = getattr(module, "scaling", {})
    return tuple(float(scales.get(name, 1.0)) for name in active), digest.hexdigest()


def active_adapters(model: nn.Module) -> list[Any]:
    """Return what adapters add to the weights of a model: of none, or merged ones, nothing."""
    found = []
    for name, module in adapted_layers(model):
        is_idle = module.disable_adapters or getattr(module, "merged_adapters", ())
        active = () if is_idle else tuple(module.active_adapters)
        if active:
            found.append((name, content(module, active)))
    return found


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is saved of a model, without its adapters, by the names of before them."""
    prefixes = [f"{name}." for name, _ in adapted_layers(model)]
    found = {}
    for name, t in model.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is not None:
            kind, _, rest = name[len(prefix) :].partition(".")
            if kind not in ("base_layer", "original_module"):
                continue
            name = prefix + rest
        found[name] = t
    return found
