"""What a causal language model loses, without the logits of all tokens."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.loss.loss_utils import ForCausalLMLoss

from bitnet_triton.nn.token_loss import summed_loss

logger = logging.getLogger("bitnet_triton")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def causal_loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Return the loss that transformers' ``ForCausalLMLoss`` gives of all logits.

    Args:
        model: with ``lm_head``.
        hidden: [B T D], what its decoder gives.
        labels: int64 [B T].
        num_items_in_batch: what the sum is divided by. Default: how many labels there are; without
            any the loss is NaN, and its gradient 0.
        ignore_index: what stands for no label.
        shift_labels: int64 [B T], the label of each token's successor, in place of ``labels``.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    wanted = shift_labels.to(hidden.device).reshape(-1)
    total = summed_loss(
        model.lm_head, hidden.reshape(-1, hidden.shape[-1]), wanted,
        words=model.config.vocab_size, ignore_index=ignore_index,
    )  # fmt: skip
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    count = (wanted != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def logits_reader(model: Any) -> str | None:
    """Say who reads the logits of a model on their way to its loss; None: nobody.

    Args:
        model: of transformers, with ``lm_head``.
    """
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "hooks on all modules"
    for module in model.lm_head.modules():
        for name in _HOOKS:
            if not all(map(_is_of_torch, getattr(module, name).values())):
                return "hooks on the output head"
    if model.loss_function is not ForCausalLMLoss:
        return "a loss function of its own"
    return None


def _is_of_torch(hook: Any) -> bool:
    """Tell whether a hook gathers shards: FSDP2's do, around the forward of any module."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


@functools.cache
def tell_reader(reader: str) -> None:
    """Warn once that ``skip_logits`` saves no memory."""
    logger.warning("`skip_logits` saves no memory: %s sees the logits of all tokens", reader)
