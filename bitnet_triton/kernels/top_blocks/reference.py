"""The choice of blocks in plain PyTorch: the oracle of the tests.

MSA (arXiv:2606.13392), MoBA (arXiv:2502.13189), InfLLM-v2 (arXiv:2509.24663) and Quest
(arXiv:2406.10774) differ in what the units are; the choice is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.top_blocks.units import Units


def unit_scores(q: Tensor, keys: Tensor, *, sets: int, bounds: bool) -> Tensor:
    """Return the scores of units [T sets U]: the sum over the heads of a set of q . key.

    Args:
        q: [T H D].
        keys: [U Hu D], or [U Hu 2 D] of bounds: the largest and the smallest entries.
        sets: of heads of q; set s looks at head ``s // (sets / Hu)`` of the units.
        bounds: sum over c of max(q_c max_c, q_c min_c) takes the place of the product: no key
            between the bounds has a larger one.
    """
    keys = keys.repeat_interleave(sets // keys.shape[1], dim=1)
    heads = q.unflatten(1, (sets, -1))
    if not bounds:
        return torch.einsum("tsgd,usd->tsu", heads, keys)
    most, least = keys.chunk(2, dim=-1)
    positive = torch.einsum("tsgd,usd->tsu", heads.clamp_min(0), most)
    return positive + torch.einsum("tsgd,usd->tsu", heads.clamp_max(0), least)


def rounded_queries(q: Tensor, sets: int) -> Tensor:
    """Return what queries [B T H D] become beside codes: integers, float32 [B T sets D]."""
    total = q.float().unflatten(2, (sets, -1)).sum(3)
    largest = total.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (total * (127.0 / largest)).round()


def block_scores(scores: Tensor, positions: Tensor, *, units: Units, block: int) -> Tensor:
    """Return the scores of blocks [T sets N]: the best of their units that are whole by then.

    Args:
        scores: [T sets U].
        positions: [T], of the queries.
        units: what is scored.
        block: tokens of a block.

    Returns:
        -inf where a block has no unit that ends before or at the query.
    """
    unit = torch.arange(scores.shape[-1], device=scores.device)
    is_whole = unit * units.stride + units.window <= positions[:, None] + 1  # [T U]
    # a score that is no number is none
    scores = scores.masked_fill(~is_whole[:, None] | scores.isnan(), float("-inf"))
    none = scores.new_full((*scores.shape[:2], 1), float("-inf"))
    blocks = range(max(int(positions.max()), 0) // block + 1)
    best = []
    for j in blocks:
        first = max(j * block // units.stride - units.before, 0)
        end = (j + 1) * block // units.stride
        best.append(torch.cat([scores[..., first:end], none], dim=-1).amax(-1))
    return torch.stack(best, dim=-1)


def choose(best: Tensor, own: Tensor, *, selected: int, initial: int, local: int) -> Tensor:
    """Return the chosen blocks int32 [T sets selected], in order, -1 behind them.

    Args:
        best: [T sets N], scores of blocks.
        own: [T], the block of each query; below 0: of padding.
        selected: how many to choose, those that are chosen always included.
        initial: first blocks that are chosen always.
        local: last blocks, the own one included, that are chosen always.
    """
    N = best.shape[-1]
    best = best.clamp_max(torch.finfo(best.dtype).max)  # below those that are chosen always
    index, own = torch.arange(N, device=best.device), own[:, None, None]
    best = best.masked_fill((index < initial) | (index > own - local), float("inf"))
    best = best.masked_fill(index > own, float("-inf"))
    order = best.sort(dim=-1, descending=True, stable=True)  # of equal ones the first
    kept = order.indices.masked_fill(order.values == float("-inf"), N)[..., :selected]
    kept = torch.nn.functional.pad(kept, (0, max(selected - N, 0)), value=N).sort(-1).values
    return kept.masked_fill(kept == N, -1).int()


def top_blocks_reference(
    q: Tensor, keys: Tensor, *, units: Units, block: int, selected: int, initial: int, local: int,
    sets: int, tokens: int, leftpad: int = 0,
) -> Tensor:  # fmt: skip
    """Return the blocks int32 [Tq sets selected] that the queries of one sequence read.

    Args:
        q: [Tq H D], of the last Tq of ``tokens`` columns.
        keys: [U Hu D or 2 D], stored as ``Units`` says.
        units: what the keys stand for.
        block: tokens of a block, a multiple of ``units.stride``.
        selected: as in ``choose``, and so are ``initial`` and ``local``.
        initial: first blocks.
        local: last blocks.
        sets: sets of blocks for each token.
        tokens: columns up to the last query, padding included.
        leftpad: columns of padding in front; blocks count from there on.
    """
    bounds = units.kind == "bounds"
    scores = unit_scores(q, keys[leftpad // units.stride :], sets=sets, bounds=bounds)
    positions = torch.arange(q.shape[0], device=q.device) + tokens - leftpad - q.shape[0]
    best = block_scores(scores, positions, units=units, block=block)
    own = torch.div(positions, block, rounding_mode="floor")
    return choose(best, own, selected=selected, initial=initial, local=local)


def pool_keys_reference(k: Tensor, *, units: Units, leftpad: int = 0) -> Tensor:
    """Return the units [T // stride, Hk, D or 2 D] of keys [T Hk D]; rows without one are zeros."""
    T = k.shape[0]
    pooled = k.new_zeros(units.rows(T), k.shape[1], units.width(k.shape[2]))
    for u in range(units.rows(T)):
        start = leftpad + u * units.stride
        part = k[start : start + units.window]
        if start + units.window <= T:
            row = leftpad // units.stride + u
            pooled[row] = (
                part.mean(0)
                if units.kind == "mean"
                else torch.cat([part.amax(0), part.amin(0)], -1)
            )
    return pooled
