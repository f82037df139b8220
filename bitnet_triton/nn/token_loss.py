"""The loss of tokens by any output head, without the logits of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet_triton.kernels.common.linear import FLOATS
from bitnet_triton.kernels.linear_cross_entropy.op import tokens_at_once
from bitnet_triton.nn.head import OutputHead


def summed_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, words: int, ignore_index: int = -100
) -> Tensor:
    """Return the sum of the cross entropies of tokens, in float32.

    A plain ``OutputHead`` makes it by ``linear_cross_entropy``. Any other head, with adapters or
    in eight bits for instance, is called for some tokens at a time, and again in the backward.

    Args:
        head: maps [N D] to logits [N, words].
        hidden: [N D].
        labels: int64 [N], or ``ignore_index``: tokens without a label cost nothing.
        words: of the vocabulary.
        ignore_index: what stands for no label. Default: -100.
    """
    if _is_plain(head):
        return head(hidden, labels, ignore_index).sum()
    if not torch.compiler.is_compiling():  # in a graph no size depends on values
        has_label = labels != ignore_index
        hidden, labels = hidden[has_label], labels[has_label]
    size = tokens_at_once(words)
    sums = []
    # once at least: parameters get a gradient, if it is 0, as other processes expect
    for start in range(0, max(1, labels.numel()), size):
        piece = head, hidden[start : start + size], labels[start : start + size], ignore_index
        if torch.is_grad_enabled():
            sums.append(checkpoint(_piece, *piece, use_reentrant=False))
        else:
            sums.append(_piece(*piece))
    return torch.stack(sums).sum()


def _piece(head: nn.Module, hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    logits = head(hidden).float()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


def _is_plain(head: Any) -> bool:
    """Tell whether a head multiplies by its weight, as it is or is gathered, and nothing else."""
    if not isinstance(head, OutputHead) or type(head).forward is not OutputHead.forward:
        return False
    if "forward" in head.__dict__ or head._compiled_call_impl is not None:
        return False
    # FSDP2 makes a plain tensor of its shards before the forward
    is_sharded = any(kind.__name__ == "FSDPModule" for kind in type(head).__mro__)
    is_tensor = is_sharded or type(head.weight) in (nn.Parameter, Tensor)
    return is_tensor and head.bias is None and head.weight.dtype in FLOATS
