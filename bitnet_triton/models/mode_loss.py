"""Losses that the modes of attention layers have of their own, and how the model adds them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("bitnet_triton")


def take_mode_loss(decoder: nn.Module) -> Tensor | None:
    """Return the sum of what the modes of all layers left in the last forward pass; None: nothing.

    It is taken away: a loss counts once.

    Args:
        decoder: with ``layers``.
    """
    found = []
    for module in _modules_with_loss(decoder):
        found.append(module.loss)
        module.loss = None
    return torch.stack(found).sum() if found else None


def _modules_with_loss(decoder: nn.Module) -> Iterator[Any]:
    for layer in getattr(decoder, "layers", ()):
        attention = layer.self_attn
        for name in getattr(attention, "brought", ()):
            module: Any = getattr(attention, name)
            if getattr(module, "loss", None) is not None:
                yield module


@functools.cache
def _tell_untaken_loss() -> None:
    logger.warning(
        "attention modes have a loss of their own, and a call without `labels` has none to add it "
        "to: they learn nothing unless you add `model.take_mode_loss()` to yours"
    )


def check_checkpointing(decoder: nn.Module) -> None:
    """Raise where a loss that a mode leaves beside the output of its layer would be lost.

    Reentrant checkpointing runs a layer without a graph, and again when the gradient is there.
    """
    for layer in getattr(decoder, "layers", ()):
        run = getattr(layer, "_gradient_checkpointing_func", None)
        is_reentrant = getattr(run, "keywords", {}).get("use_reentrant", False)
        if not (getattr(layer, "gradient_checkpointing", False) and is_reentrant):
            continue
        for name in getattr(layer.self_attn, "brought", ()):
            module: Any = getattr(layer.self_attn, name)
            if hasattr(module, "loss") and any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"`gradient_checkpointing_kwargs`: expected use_reentrant=False: attention "
                    f"{name!r} would lose the loss by which its parameters learn"
                )


def add_mode_loss(
    decoder: nn.Module, outputs: Any, labels: Tensor | None, items: int | Tensor | None
) -> tuple[Any, Tensor | None]:
    """Add to the loss of a model what its modes left.

    Args:
        decoder: of the model.
        outputs: of the model, a tuple with the loss first, or with a field of that name; the latter
            is changed in place.
        labels: int64 [B T]; None: the model has no loss, and theirs are left where they are, which
            the log says once.
        items: labels that the loss is a mean over, where it is one over several calls
            (``num_items_in_batch`` of transformers' Trainer). The modes' losses are means over a
            call: this one counts by its share of them.

    Returns:
        The outputs, and without its gradient what was added; None: nothing.
    """
    check_checkpointing(decoder)
    if labels is None:
        if next(_modules_with_loss(decoder), None) is not None:
            _tell_untaken_loss()
        return outputs, None
    loss = take_mode_loss(decoder)
    if loss is None:
        return outputs, None
    if items is not None:
        loss = loss * ((labels[..., 1:] != -100).sum() / items)
    if isinstance(outputs, tuple):
        outputs = (outputs[0] + loss.to(outputs[0].dtype), *outputs[1:])
    else:
        outputs.loss = outputs.loss + loss.to(outputs.loss.dtype)
    return outputs, loss.detach()
