"""MagicPIG's attention by importance sampling (arXiv:2410.16179) in plain PyTorch: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.merge import merge_attention

# A sample is divided by its probability: a row that no sample holds has none to divide by
LEAST_PROBABILITY = 1e-30


def hash_reference(x: Tensor, planes: Tensor) -> Tensor:
    """Return the code of ``x`` [..., D] in each table, int64 [..., L]: SimHash (section 4.2).

    Bit k of table l is on which side of plane [k, l] of ``planes`` [K L D] the vector lies.
    """
    bits = torch.einsum("...d,kld->...lk", x, planes.to(x.dtype)) > 0
    return (bits << torch.arange(planes.shape[0], device=x.device)).sum(-1)


def cosine_reference(q: Tensor, k: Tensor, centre: Tensor) -> Tensor:
    """Return the cosines of q [B G Hk D] and centred keys [B T Hk D], in [-1, 1]: [B G Hk T]."""
    centred = k - centre[:, None].to(k.dtype)
    norms = q.norm(dim=-1)[..., None] * centred.norm(dim=-1).transpose(1, 2)[:, None]
    dots = torch.einsum("bghd,bthd->bght", q, centred)
    return (dots / norms.clamp_min(torch.finfo(q.dtype).tiny)).clamp(-1, 1)


def probability_reference(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """Return how probably a key meets the query in two tables or more (section 4.2).

    ``p = 1 - arccos(cos) / pi``, ``x = p**K``, ``u = 1 - (1 - x)**L - L x (1 - x)**(L - 1)``. Where
    few tables meet, that difference cancels: there the terms of the binomial sum are added, from
    two tables on, all of which are positive.
    """
    L, x = tables, (1 - cosine.arccos() / math.pi) ** bits
    none = torch.exp((L - 1) * torch.log1p(-x.clamp_max(1 - 1e-9)))
    large = 1 - none * (1 + (L - 1) * x)
    ratio = x / (1 - x).clamp_min(1e-9)
    term = L * (L - 1) / 2 * x.square() * (1 - x) ** (L - 2)
    small = term
    for j in range(2, min(L, 14)):
        term = term * (L - j) / (j + 1) * ratio
        small = small + term
    return torch.where(L * x < 1, small, large)


def either(probabilities: Tensor, dim: int) -> Tensor:
    """Return how probable at least one of independent events is, ``1 - prod (1 - u)``.

    ``a + b (1 - a)`` again and again: no difference of numbers near 1.
    """
    found = torch.zeros_like(probabilities.select(dim, 0))
    for u in probabilities.unbind(dim):
        found = found + u * (1 - found)
    return found


def mean_direction(q: Tensor) -> Tensor:
    """Return the mean of normalised queries [B G Hk D], as [B 1 Hk D]."""
    norms = q.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    return (q / norms).mean(1, keepdim=True)


def weigh_reference(
    q: Tensor, k: Tensor, centre: Tensor, bits: int, tables: int, share: str
) -> Tensor:
    """Return how probably keys are read for queries q [B G Hk D]: [B G Hk T].

    ``tables`` are those of one query head: with "union" the G heads of a group have that many each.
    """
    asked = mean_direction(q) if share == "proposal" else q
    u = probability_reference(cosine_reference(asked, k, centre), bits, tables)
    if share == "union":
        u = either(u, 1)[:, None]
    return u.expand(-1, q.shape[1], -1, -1)


def collide_reference(codes_q: Tensor, codes_k: Tensor) -> Tensor:
    """Return in how many tables codes [B G Hk L] and [B T Hk L] are equal: [B G Hk T]."""
    same = codes_q[:, :, None] == codes_k[:, None]  # [B G T Hk L]
    return same.sum(-1).transpose(2, 3)


def sample_reference(codes_q: Tensor, codes_k: Tensor, share: str) -> Tensor:
    """Return which keys [B T Hk] are read for which queries: bool [B G Hk T].

    Args:
        codes_q: [B G Hk L]; of the mean direction where ``share`` is "proposal", then G is 1.
        codes_k: [B T Hk L].
        share: with "union" head g of a group has every table from ``g L / G`` on, L / G of them.
    """
    if share != "union":
        return collide_reference(codes_q, codes_k) >= 2
    G, L = codes_q.shape[1], codes_q.shape[-1]
    found = torch.zeros_like(collide_reference(codes_q[:, :1], codes_k), dtype=torch.bool)
    for g in range(G):
        own = slice(g * L // G, (g + 1) * L // G)
        found |= collide_reference(codes_q[:, g : g + 1, :, own], codes_k[..., own]) >= 2
    return found


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, log_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with q [B G Hk D] to ``visible`` keys [B T Hk D], bool [B G Hk T].

    Args:
        q: queries.
        k: keys.
        v: values [B T Hk Dv].
        scale: multiplies the scores.
        visible: which keys count; a query may see none.
        log_weight: [B G Hk T], added to the scores; None: nothing.

    Returns:
        out [B G Hk Dv] and lse [B G Hk]; 0 and -inf where nothing is visible.
    """
    scores = torch.einsum("bghd,bthd->bght", q, k) * scale
    if log_weight is not None:
        scores = scores + log_weight
    scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bght,bthd->bghd", weights, v) / total.masked_fill(total == 0, 1.0)
    return out, scores.logsumexp(-1)


def lsh_sampling_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sampled: Tensor,
    inclusion: Tensor,
    exact: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to exact keys and to a sample, each sampled row by one over its probability.

    ``o = (sum_S e^{s q k - ln u} v + sum_exact e^{s q k} v) / (the same sums without v)``, as two
    results that are merged by their sums.

    Args:
        q: [B G Hk D].
        k: [B T Hk D].
        v: [B T Hk Dv].
        sampled: bool [B G Hk T].
        inclusion: [B G Hk T], how probably each key was sampled.
        exact: bool [B T], keys that are read in any case, once.
        scale: multiplies the scores.
    """
    rows = exact[:, None, None].expand(sampled.shape)
    log_weight = -inclusion.clamp_min(LEAST_PROBABILITY).log()
    parts = (
        attend_reference(q, k, v, scale, sampled & ~rows, log_weight),
        attend_reference(q, k, v, scale, rows, None),
    )
    # as merge_attention has them: one query, heads in one dimension
    outs = [out.transpose(1, 2).flatten(1, 2)[:, None] for out, _ in parts]
    lses = [lse.transpose(1, 2).flatten(1)[..., None] for _, lse in parts]
    return merge_attention(outs, lses)
