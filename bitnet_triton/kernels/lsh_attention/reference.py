"""Reformer attention in plain PyTorch (arXiv:2001.04451, section 2): the oracle of the tests.

Symbols of the paper: P_i the tokens that i may attend to, N_ij in how many rounds j is in P_i,
z(i, P_i) the logarithm of the sum of exponentials.
"""

from __future__ import annotations

import torch
from torch import Tensor

# what the score of a token with itself is lowered by: it counts where nothing else does
_ITSELF = 1e5


def visible_pairs(
    numbers: Tensor, *, window: int, pattern: str, causal: bool, leftpad: Tensor | None = None
) -> Tensor:
    """Return which pairs of tokens see each other in each round, bool [R B H T T].

    Args:
        numbers: [B T H R], the bucket of each token in each round.
        window: tokens of a bucket, itself included, that a token looks back to; or of a chunk.
        pattern: "window" or "chunk".
        causal: a token sees none behind itself.
        leftpad: [B], the first token that counts.
    """
    B, T, _, R = numbers.shape
    device, position = numbers.device, torch.arange(T, device=numbers.device)
    first = torch.zeros(B, 1, device=device) if leftpad is None else leftpad[:, None]
    is_token = (position >= first)[:, None]  # [B 1 T]
    rounds = []
    for r in range(R):
        bucket = numbers[..., r].transpose(1, 2)  # [B H T]
        same = bucket[..., :, None] == bucket[..., None, :]
        same = same & is_token[..., :, None] & is_token[..., None, :]
        if pattern == "window":
            place = (same & (position[:, None] >= position)).sum(-1)  # its number in its bucket
            distance = place[..., :, None] - place[..., None, :]
            visible = same & (distance.abs() < window)
        else:
            sorted_by = (bucket * T + position).masked_fill(~is_token, torch.iinfo(torch.int64).max)
            chunk = sorted_by.argsort(dim=-1, stable=True).argsort(-1) // window
            visible = same & ((chunk[..., :, None] - chunk[..., None, :]).abs() <= 1)
        if causal:
            visible = visible & (position[:, None] >= position)
        rounds.append(visible)
    return torch.stack(rounds)


def unit_keys(qk: Tensor) -> Tensor:
    """Return k_j = q_j / |q_j|; zeros for zeros, without a gradient."""
    square = qk.square().sum(-1, keepdim=True)
    inverse = torch.where(square > 0, square, torch.ones_like(square)).rsqrt()
    return qk * inverse * (square > 0)


def lsh_attention_reference(qk: Tensor, v: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Attend with qk [B T H D] to itself, round by round, and merge the rounds.

    Args:
        qk: queries; keys are these at length 1.
        v: [B T H Dv].
        visible: bool [R B H T T].
        scale: multiplies the scores.

    Returns:
        [B T H Dv]; zeros for a token that sees nothing, not even itself.
    """
    scores = torch.einsum("bihd,bjhd->bhij", qk, unit_keys(qk)) * scale
    itself = torch.eye(qk.shape[1], dtype=torch.bool, device=qk.device)
    lowered = min(_ITSELF, torch.finfo(qk.dtype).max / 2)
    scores = torch.where(itself, scores - lowered, scores)
    # a pair that several rounds find counts once
    scores = scores - visible.sum(0).clamp_min(1).to(qk.dtype).log()
    parts, sums = [], []
    for of_round in visible:
        empty = ~of_round.any(-1)
        seen = scores.masked_fill(~of_round, float("-inf")).masked_fill(empty[..., None], 0.0)
        parts.append(torch.einsum("bhij,bjhd->bihd", seen.softmax(-1), v))
        sums.append(seen.logsumexp(-1).masked_fill(empty, float("-inf")))
    z = torch.stack(sums)  # [R B H T]
    empty = (z == float("-inf")).all(0)
    weights = z.masked_fill(empty, 0.0).softmax(0).masked_fill(empty, 0.0)
    return torch.einsum("rbhi,rbihd->bihd", weights, torch.stack(parts))


def union_attention(
    qk: Tensor, k: Tensor, v: Tensor, union: Tensor, rows: slice, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with some queries to the pairs [B H rows T] that any round has found, at once.

    Returns:
        out [B rows H Dv], and weights [B H rows T] without those of tokens that see only
        themselves.
    """
    T = qk.shape[1]
    itself = torch.arange(T, device=qk.device)[rows, None] == torch.arange(T, device=qk.device)
    others = union & ~itself
    scores = torch.einsum("bihd,bjhd->bhij", qk[:, rows], k) * scale
    alone = ~others.any(-1, keepdim=True)
    weights = scores.masked_fill(~others, float("-inf")).masked_fill(alone, 0.0).softmax(-1)
    weights = weights.masked_fill(alone, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out + v[:, rows] * (alone & union.any(-1, keepdim=True)).transpose(1, 2), weights
