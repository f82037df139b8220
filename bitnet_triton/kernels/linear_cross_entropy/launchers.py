"""Both passes over the logits, a piece at a time: products by PyTorch, the rest by a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.runtime import Implementation, select

# words of a block start where a row of the weight is aligned whatever its dtype
_WORDS = 64


def _triton_fwd(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.linear_cross_entropy.forward import launch_cross_entropy

    return launch_cross_entropy(logits, labels, with_gradient)


def _triton_bwd(logits: Tensor, labels: Tensor, stats: Tensor, dlosses: Tensor, first: int) -> None:
    from bitnet_triton.kernels.linear_cross_entropy.backward import launch_cross_entropy_bwd

    launch_cross_entropy_bwd(logits, labels, stats, dlosses, first)


def _reference_fwd(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    wide, label = logits.float(), labels[:, None]
    pivot = wide.amax(-1, keepdim=True)
    target = wide.gather(-1, label)
    shares = (wide - pivot).exp()
    total = shares.sum(-1, keepdim=True)
    if with_gradient:
        one = torch.ones_like(total)
        logits.copy_((shares / total).scatter_add_(-1, label, -one))
    return (total.log() + (pivot - target))[:, 0], torch.cat([pivot, total], -1)


def _reference_bwd(
    logits: Tensor, labels: Tensor, stats: Tensor, dlosses: Tensor, first: int
) -> None:
    pivot, total = stats.split(1, -1)
    words = torch.arange(first, first + logits.shape[1], device=logits.device)
    is_label = words == labels[:, None]
    shares = (logits.float() - pivot).exp() / total
    logits.copy_((shares - is_label.float()) * dlosses[:, None])


ENTROPY_FWD = {
    "triton": Implementation(_triton_fwd),
    "reference": Implementation(_reference_fwd),
}
ENTROPY_BWD = {
    "triton": Implementation(_triton_bwd),
    "reference": Implementation(_reference_bwd),
}


def tokens_with_label(labels: Tensor, ignore_index: int, V: int) -> Tensor | None:
    """Return which of labels [N] are labels; None: all.

    Raises:
        ValueError: one is no word.
    """
    kept = (labels != ignore_index).nonzero()[:, 0]
    found = labels if kept.numel() == labels.numel() else labels[kept]
    if found.numel():
        least, most = (int(value) for value in found.aminmax())
        if least < 0 or most >= V:
            wrong = least if least < 0 else most
            raise ValueError(
                f"`labels`: expected words from 0 to {V - 1} or {ignore_index}, got {wrong}"
            )
    return None if found is labels else kept


def run_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map hidden [N D], weight [V D] and labels [N] to losses [N], stats [N, 2] and dhidden.

    ``chunk`` tokens at a time. dhidden [N D] is the gradient of each token's loss; without
    ``with_gradient`` it is [0 D].
    """
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    N, device = hidden.shape[0], hidden.device
    losses = torch.zeros(N, dtype=torch.float32, device=device)
    stats = torch.zeros((N, 2), dtype=torch.float32, device=device)
    dhidden = torch.zeros_like(hidden) if with_gradient else torch.empty_like(hidden[:0])
    kept = tokens_with_label(labels, ignore_index, weight.shape[0])
    count = N if kept is None else kept.numel()
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        where = slice(start, stop) if kept is None else kept[start:stop]
        logits = F.linear(hidden[where], weight)
        run = select("linear_cross_entropy", ENTROPY_FWD, device, logits)
        losses[where], stats[where] = run(logits, labels[where], with_gradient)
        if with_gradient:
            dhidden[where] = logits @ weight
    return losses, stats, dhidden


def run_backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: Tensor,
    ignore_index: int,
    chunk: int,
    with_dhidden: bool,
) -> tuple[Tensor, Tensor]:
    """Map dlosses [N], and what the forward had and found, to dhidden [N D] and dweight [V D].

    A block of words at a time, of as many logits as ``chunk`` tokens have: each row of dweight is
    then one product over all tokens. dhidden is [0 D] where it is not wanted.
    """
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    dlosses, V = dlosses.contiguous(), weight.shape[0]
    kept = tokens_with_label(labels, ignore_index, V)
    if kept is not None:
        hidden_kept, labels, stats, dlosses = (t[kept] for t in (hidden, labels, stats, dlosses))
    else:
        hidden_kept = hidden
    M = hidden_kept.shape[0]
    dweight = torch.zeros_like(weight) if M == 0 else torch.empty_like(weight)
    sums = torch.zeros(hidden_kept.shape, dtype=torch.float32, device=hidden.device)
    words = max(_WORDS, chunk * V // max(M, 1) // _WORDS * _WORDS)
    for first in range(0, V if M else 0, words):
        block = weight[first : first + words]
        logits = F.linear(hidden_kept, block)
        run = select("linear_cross_entropy_bwd", ENTROPY_BWD, hidden.device, logits)
        run(logits, labels, stats, dlosses, first)
        torch.mm(logits.t(), hidden_kept, out=dweight[first : first + words])
        if with_dhidden:
            sums += logits @ block
    if not with_dhidden:
        return torch.empty_like(hidden[:0]), dweight
    if kept is None:
        return sums.to(hidden.dtype), dweight
    dhidden = torch.zeros_like(hidden)
    dhidden[kept] = sums.to(hidden.dtype)
    return dhidden, dweight
