"""Verified sampling (arXiv:2510.05688) in plain PyTorch: the oracle, group by group."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """Mix 32 bits (lowbias32)."""
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK
    return x ^ x >> 16


def key_of(seed: int, n: int, head: int) -> int:
    """Return what the permutations of a call with n rows begin with, for one key head."""
    return mix((seed + mix(n) + head * 0x9E3779B9) & _MASK)


def permutation_reference(n: int, key: int) -> Tensor:
    """Return the rows 0 .. n - 1 in a random order that nothing but the key decides about."""
    bits = max((n - 1).bit_length(), 1)
    x, shift = torch.arange(1 << bits), (bits + 1) // 2
    for turn in range(4):
        factor = mix((key + turn * 0x9E3779B9) & _MASK) | 1
        x = (x * factor + mix(factor)) & ((1 << bits) - 1)
        x = x ^ (x >> shift)
    return x[x < n]


def normal_spread_reference(exponents: Tensor, count: int, deviations: float) -> Tensor:
    """Return the variance [...] of ``count`` exponentials of normal numbers, from a sample of them.

    A few large terms hide from a small sample; exponents tell of them, as they go on like those
    that were seen. With mean m and variance s**2 of ``exponents`` [... base], the latter the
    largest that such a sample may well come from (its standard error is s**2 sqrt(2 / base)), and x
    what the largest of ``count`` standard normal numbers exceeds with a probability of 1 - Phi(z)
    on both sides, E e^(j y) up to m + s x is e^(j m + j**2 s**2 / 2) Phi(x - j s).
    """
    base = exponents.shape[-1]
    mean = exponents.mean(-1)
    variance = (exponents - mean[..., None]).square().sum(-1) / max(base - 1, 1)
    variance = variance * (1 + deviations * math.sqrt(2 / base))
    log_count = max(math.log(count / NormalDist().cdf(-deviations) / 2), 1.0)
    far = math.sqrt(2 * log_count)
    most = far - (math.log(log_count) + math.log(4 * math.pi)) / (2 * far)
    below = torch.special.log_ndtr
    first = mean + variance / 2 + below(most - variance.sqrt())
    second = 2 * (mean + variance) + below(most - 2 * variance.sqrt())
    return (second.clamp_max(80).exp() - (2 * first.clamp_max(40)).exp()).clamp_min(0)


def budget_reference(
    scores: Tensor, rest: Tensor, base: Tensor, deviations: float, epsilon: float, least: int,
    tails: str,
) -> int:  # fmt: skip
    """Return how many of the rows ``rest`` the sum of exponentials has to be estimated from.

    By the central limit theorem (section 4): ``b >= (z n sigma / (epsilon D))**2``, less what
    drawing without replacement saves; the largest of the heads that share the rows. The variance of
    the base sample is no more than an estimate, poor where few terms are large: ``sigma**2`` is
    that with ``z sqrt((m4 - m2**2) / base)`` on top, z times its own standard error; and with
    "normal" ``tails`` at least ``normal_spread_reference``.

    Args:
        scores: [G n], scaled, of all rows.
        rest: bool [n], rows that are not read in any case.
        base: numbers of those that tell how far the terms lie apart.
        deviations: z, by how many standard errors the sum may be off.
        epsilon: as what share of the sum.
        least: the fewest rows.
        tails: "normal" or "sampled".
    """
    count = int(rest.sum())
    if not count:
        return 0
    pivot = scores[:, base].amax(-1, keepdim=True)
    terms = (scores - pivot).exp()
    estimate = (terms * ~rest).sum(-1) + count * terms[:, base].mean(-1)
    off = terms[:, base] - terms[:, base].mean(-1, keepdim=True)
    variance = off.square().sum(-1) / max(len(base) - 1, 1)
    doubt = (off.pow(4).mean(-1) - variance.square()).clamp_min(0) / len(base)
    spread = variance + deviations * doubt.sqrt()
    if tails == "normal":
        normal = normal_spread_reference(scores[:, base] - pivot, count, deviations)
        spread = torch.maximum(spread, normal)
    asked = (deviations / epsilon * count / estimate).square() * spread
    asked = (asked / (1 + asked / count)).amax()
    return min(max(math.ceil(asked), min(least, count)), count)


def verified_rows_reference(
    q: Tensor, k: Tensor, pages: Tensor, *,
    page: int, base: int, deviations: float, epsilon: float, seed: int, head: int, scale: float,
    tails: str,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Return which rows one group of heads reads in any case, and which it draws.

    Args:
        q: [G D], the heads of the group.
        k: [n D], the rows of one sequence, without padding.
        pages: int [selected], chosen ones, -1 for none.
        page: rows of a page.
        base: rows that tell how far terms lie apart, and the fewest that are drawn.
        deviations: z, by how many standard errors the sum may be off.
        epsilon: as what share of the sum.
        seed: of the call.
        head: number of the key head.
        scale: multiplies the scores.
        tails: "normal" or "sampled".

    Returns:
        bool [n], the rows of the pages; the numbers of those that are drawn, each of which stands
        for ``rest / drawn`` rows; and how many rows told the spread.
    """
    n = k.shape[0]
    chosen = torch.isin(torch.arange(n, device=k.device) // page, pages)
    rest, key = ~chosen, key_of(seed, n, head)
    first, second = (
        order[rest[order]] for order in
        (permutation_reference(n, each).to(k.device) for each in (key, mix(key)))
    )  # fmt: skip
    told = first[:base]
    budget = budget_reference(q @ k.T * scale, rest, told, deviations, epsilon, base, tails)
    return chosen, second[:budget], len(told)


def verified_reference(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, drawn: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with q [G D] to chosen rows, and to drawn ones in place of all others.

    Returns:
        out [G Dv] and lse [G].
    """
    rest = int((~chosen).sum())
    log_weight = torch.where(chosen, 0.0, float("-inf")).to(q.dtype)
    log_weight[drawn] = math.log(rest / max(len(drawn), 1)) if rest else 0.0
    scores = q @ k.T * scale + log_weight
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
