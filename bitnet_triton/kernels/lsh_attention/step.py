"""The latest token of each row against all that a cache holds, by their buckets: backends."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.lsh_attention.reference import unit_keys
from bitnet_triton.runtime import Implementation, register_op, select


def seen_by_last(numbers: Tensor, window: int, leftpad: Tensor | None = None) -> Tensor:
    """Return which tokens the last one sees in any round, bool [B H T]; itself too.

    Args:
        numbers: int32 [B T H R], the bucket of each token in each round.
        window: tokens of its bucket that it looks back to, itself included.
        leftpad: int32 [B], the first token that counts.
    """
    numbers = numbers.permute(0, 2, 3, 1)  # [B H R T]
    same = numbers == numbers[..., -1:]
    if leftpad is not None:
        position = torch.arange(same.shape[-1], device=same.device)
        same = same & (position >= leftpad[:, None])[:, None, None]
    behind = same.flip(-1).cumsum(-1).flip(-1)  # how many of the bucket from here on
    return (same & (behind <= window)).any(2)


def _reference(
    qk: Tensor, v: Tensor, numbers: Tensor, window: int, scale: float, leftpad: Tensor | None
) -> Tensor:
    seen = seen_by_last(numbers.permute(0, 3, 1, 2), window, leftpad)
    others = seen.clone()
    others[..., -1] = False
    alone = ~others.any(-1, keepdim=True)
    k = unit_keys(qk.float())
    scores = torch.einsum("bhd,bjhd->bhj", qk[:, -1].float(), k) * scale
    # a token that sees nothing else sees itself
    shown = torch.where(alone, seen, others)
    scores = scores.masked_fill(~shown, float("-inf")).masked_fill(~seen.any(-1, True), 0.0)
    weights = scores.softmax(-1).masked_fill(~shown, 0.0)
    values = torch.where(shown.any(1)[..., None, None], v.float(), 0.0)
    return torch.einsum("bhj,bjhd->bhd", weights, values).to(v.dtype)[:, None]


def _triton(
    qk: Tensor, v: Tensor, numbers: Tensor, window: int, scale: float, leftpad: Tensor | None
) -> Tensor:
    # Triton is imported on first use
    from bitnet_triton.kernels.lsh_attention.decode import launch_bucket_step

    qk, v, numbers = (t if t.stride(-1) == 1 else t.contiguous() for t in (qk, v, numbers))
    return launch_bucket_step(qk, v, numbers, window=window, scale=scale, leftpad=leftpad)


BUCKET_STEP = {
    "triton": Implementation(_triton),
    "reference": Implementation(_reference),
}


def _launch(
    qk: Tensor, v: Tensor, numbers: Tensor, window: int, scale: float, leftpad: Tensor | None
) -> Tensor:
    run = select("bucket_attention_last", BUCKET_STEP, qk.device)
    return run(qk, v, numbers, window, scale, leftpad)


def _fake(
    qk: Tensor, v: Tensor, numbers: Tensor, window: int, scale: float, leftpad: Tensor | None
) -> Tensor:
    return v.new_empty((v.shape[0], 1, *v.shape[2:]))


_attend_last = register_op("bucket_attention_last", _launch, _fake)


def bucket_attention_last(
    qk: Tensor,
    v: Tensor,
    numbers: Tensor,
    *,
    window: int,
    scale: float,
    leftpad: Tensor | None = None,
) -> Tensor:
    """Return what ``bucket_attention`` gives the last token, [B 1 H Dv]; no gradient.

    Args:
        qk: [B T H D].
        v: [B T H Dv].
        numbers: int32 [B H R T], the bucket of each token in each round.
        window: tokens of its bucket that it looks back to, itself included.
        scale: multiplies the scores.
        leftpad: int32 [B], the first token that counts.
    """
    return _attend_last(qk, v, numbers, window, scale, leftpad)
