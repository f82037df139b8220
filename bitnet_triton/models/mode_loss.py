"""Losses that the modes of attention layers have of their own, and how the model adds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def take_mode_loss(decoder: nn.Module) -> Tensor | None:
    """Return the sum of what the modes of all layers left in the last forward pass; None: nothing.

    It is taken away: a loss counts once.

    Args:
        decoder: with ``layers``.
    """
    found = []
    for layer in getattr(decoder, "layers", ()):
        attention = layer.self_attn
        for name in getattr(attention, "brought", ()):
            module: Any = getattr(attention, name)
            if getattr(module, "loss", None) is not None:
                found.append(module.loss)
                module.loss = None
    return torch.stack(found).sum() if found else None


def add_mode_loss(
    decoder: nn.Module, outputs: Any, labels: Tensor, items: int | Tensor | None
) -> Tensor | None:
    """Add to the loss of a model what its modes left, and return that without its gradient.

    Args:
        decoder: of the model.
        outputs: of the model, a tuple with the loss first, or with a field of that name; the latter
            is changed in place.
        labels: int64 [B T].
        items: labels that the loss is a mean over, where it is one over several calls
            (``num_items_in_batch`` of transformers' Trainer). The modes' losses are means over a
            call: this one counts by its share of them.

    Returns:
        What was added; None: nothing.
    """
    loss = take_mode_loss(decoder)
    if loss is None or isinstance(outputs, tuple):
        return None if loss is None else loss.detach()
    if items is not None:
        loss = loss * ((labels[..., 1:] != -100).sum() / items)
    outputs.loss = outputs.loss + loss.to(outputs.loss.dtype)
    return loss.detach()
