"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.lsh_sampling.reference import (
    hash_reference,
    lsh_sampling_reference,
    mean_direction,
    sample_reference,
    weigh_reference,
)
from bitnet_triton.runtime import Implementation

SHARES = ("own", "union", "proposal")

_TENSORS = (
    "planes", "centre", "norms", "ids", "offsets", "bounds", "tail", "leftpad", "used",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sampling:
    """Everything but q, k and v.

    Attributes:
        planes: float32 [K L D].
        centre: float32 [B Hk D].
        norms: float32 [B Hk rows], how far keys are from it.
        ids: uint16 [B Hk L n], the rows of each segment, sorted by their codes.
        offsets: int32 [S B Hk L 2**K + 1], where codes start.
        bounds: int32 [S + 1], where segments start, and the tail behind them.
        tail: int16 [B Hk L room], codes of the rows behind the segments.
        leftpad: int32 [B], the first row that is no padding; None: the first one.
        used: int32 [B], one past the last row; None: all of k.
        length: rows that have codes; what is behind them is read in any case.
        sinks: first rows that are read in any case.
        recent: latest rows that are read in any case.
        share: one of ``SHARES``.
        scale: multiplies the scores.
    """

    planes: Tensor
    centre: Tensor
    norms: Tensor
    ids: Tensor
    offsets: Tensor
    bounds: Tensor
    tail: Tensor
    leftpad: Tensor | None
    used: Tensor | None
    length: int
    sinks: int
    recent: int
    share: str
    scale: float

    @classmethod
    def build(
        cls, tensors: list[Tensor | None], numbers: list[int], scale: float
    ) -> Sampling:  # fmt: skip
        """Put together what ``flatten`` took apart."""
        length, sinks, recent, share = numbers
        more: dict[str, Any] = dict(zip(_TENSORS, tensors))
        return cls(
            **more, length=length, sinks=sinks, recent=recent, share=SHARES[share], scale=scale
        )

    def flatten(self) -> tuple:
        """Take it apart into the arguments of ``build``."""
        tensors = [getattr(self, name) for name in _TENSORS]
        numbers = [self.length, self.sinks, self.recent, SHARES.index(self.share)]
        return tensors, numbers, self.scale


def codes_of_segment(ids: Tensor, offsets: Tensor) -> Tensor:
    """Return the codes int16 [... n] of rows that are sorted: ids [... n], offsets [... W].

    Padding has some code.
    """
    n = ids.shape[-1]
    codes = torch.empty(ids.shape, dtype=torch.int16, device=ids.device)
    place = torch.arange(n, device=ids.device, dtype=torch.int32)
    flat = zip(ids.flatten(0, -3), offsets.flatten(0, -3), codes.flatten(0, -3))
    for own, starts, out in flat:  # a head at a time: what is between is four times as large
        places = place.expand(starts.shape[0], -1).contiguous()
        code = torch.searchsorted(starts, places, right=True)
        rows = own.view(torch.int16).long() & 0xFFFF
        out.scatter_(-1, rows, (code - 1).to(torch.int16))
    return codes


def codes_of(ids: Tensor, offsets: Tensor, bounds: list[int], tail: Tensor) -> Tensor:
    """Return the codes int16 [B Hk L T] of all rows, those of ``tail`` [B Hk L ...] behind."""
    parts = [
        codes_of_segment(ids[..., start:end], offsets[s])
        for s, (start, end) in enumerate(pairwise(bounds))
    ]
    return torch.cat([*parts, tail], -1)


# --- codes and tables


def _triton_hash(
    keys: Tensor, planes: Tensor, centre: Tensor, codes: Tensor, norms: Tensor
) -> None:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.lsh_sampling.hash import launch_hash_keys

    launch_hash_keys(keys, planes, centre, codes, norms)


def _reference_hash(
    keys: Tensor, planes: Tensor, centre: Tensor, codes: Tensor, norms: Tensor
) -> None:
    centred = keys.float() - centre[:, None]  # [B T Hk D]
    codes.copy_(hash_reference(centred, planes).permute(0, 2, 3, 1))
    norms.copy_(centred.norm(dim=-1).transpose(1, 2))


def _triton_build(
    codes: Tensor, bits: int, start: int, leftpad: Tensor | None
) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.lsh_sampling.build import launch_build

    return launch_build(codes, bits, start, leftpad)


def _reference_build(
    codes: Tensor, bits: int, start: int, leftpad: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes = codes.int()
    if leftpad is not None:
        rows = torch.arange(codes.shape[-1], device=codes.device) + start
        codes = torch.where(rows < leftpad[:, None, None, None], 1 << bits, codes)
    found, order = codes.sort(dim=-1, stable=True)
    every = torch.arange((1 << bits) + 1, dtype=torch.int32, device=codes.device)
    offsets = torch.searchsorted(found, every.expand(*codes.shape[:-1], -1).contiguous())
    return order.to(torch.int32).to(torch.uint16), offsets.int()


HASH = {
    "triton": Implementation(_triton_hash),
    "reference": Implementation(_reference_hash),
}
BUILD = {
    "triton": Implementation(_triton_build),
    "reference": Implementation(_reference_build),
}


# --- attention


def triton_sample(q: Tensor, Hk: int, call: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """List the rows that q [B 1 H D] samples, by launches alone.

    Returns:
        What ``launch_probe`` does, and the mean direction of each group, if that was asked.
    """
    from bitnet_triton.kernels.lsh_sampling.hash import (
        launch_hash_queries,
        launch_mean_direction,
    )
    from bitnet_triton.kernels.lsh_sampling.probe import launch_probe

    (B, _, H, _), L = q.shape, call.planes.shape[1]
    parts = H // Hk if call.share == "union" else 1
    direction = launch_mean_direction(q, Hk) if call.share == "proposal" else None
    asked = q if direction is None else direction
    lists = H if call.share == "own" else Hk
    codes = torch.empty((B, lists, L), dtype=torch.int16, device=q.device)
    launch_hash_queries(asked, call.planes, codes, parts)
    rows, counts = launch_probe(
        codes, call.ids, call.offsets, call.tail, call.bounds,
        tables=L // parts, length=call.length, used=call.used,
    )  # fmt: skip
    return rows, counts, direction


def triton_sampling(q: Tensor, k: Tensor, v: Tensor, call: Sampling) -> tuple[Tensor, Tensor]:
    """Attend with q [B 1 H D] by launches alone: it can be recorded."""
    from bitnet_triton.kernels.lsh_sampling.gather import (
        Angles,
        Parts,
        Rows,
        launch_gather,
        list_splits,
    )

    H, Hk, L = q.shape[2], k.shape[2], call.planes.shape[1]
    rows, counts, direction = triton_sample(q, Hk, call)
    tables = L * Hk // H if call.share == "union" else L
    angles = Angles(call.centre, call.norms, direction, call.planes.shape[0], tables)
    lists = Rows(rows, counts, call.bounds)
    splits = list_splits(q.device, counts.shape[1] <= Hk)
    parts = Parts.empty(q, counts.shape[2] * splits + 1, v.shape[-1])
    launch_gather(
        q, k, v, lists, parts, part0=0, exact=(call.sinks, call.recent), scale=call.scale,
        angles=angles, kind=call.share, leftpad=call.leftpad, used=call.used,
    )  # fmt: skip
    return parts.merge(q)


def _triton_attention(q: Tensor, k: Tensor, v: Tensor, call: Sampling) -> tuple[Tensor, Tensor]:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return triton_sampling(q, k, v, call)


def reference_sample(
    q: Tensor, k: Tensor, call: Sampling, hashed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q as [B G Hk D], which of the first ``hashed`` keys are sampled and how probably.

    The latter are bool and float [B G Hk hashed].
    """
    q = q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(1, 2)
    tail = call.tail[..., : call.length - call.ids.shape[-1]]
    codes = codes_of(call.ids, call.offsets, call.bounds.tolist(), tail).int() & 0xFFFF
    codes = codes[..., :hashed].permute(0, 3, 1, 2)  # [B T Hk L]
    asked = mean_direction(q.float()) if call.share == "proposal" else q.float()
    sampled = sample_reference(hash_reference(asked, call.planes), codes, call.share)
    tables = call.planes.shape[1] // (q.shape[1] if call.share == "union" else 1)
    u = weigh_reference(q, k[:, :hashed], call.centre, call.planes.shape[0], tables, call.share)
    rows = torch.arange(hashed, device=q.device)
    if call.leftpad is not None:
        sampled = sampled & (rows >= call.leftpad[:, None])[:, None, None]
    return q, sampled.expand(u.shape), u


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, call: Sampling) -> tuple[Tensor, Tensor]:
    dtype, T = q.dtype, k.shape[1]
    q, k, v = (t.float() for t in (q, k, v))
    hashed = min(call.length, T)
    q, sampled, u = reference_sample(q, k, call, hashed)
    behind = (0, T - hashed)
    sampled = torch.nn.functional.pad(sampled, behind)
    u = torch.nn.functional.pad(u, behind, value=1.0)
    rows = torch.arange(T, device=q.device)[None]
    first = 0 if call.leftpad is None else call.leftpad[:, None]
    used = T if call.used is None else call.used[:, None].clamp_max(T)
    early, late = rows < first + call.sinks, rows >= used - call.recent
    exact = ((rows >= first) & (rows < used) & (early | late)).expand(q.shape[0], -1)
    sampled = sampled & (rows < used).expand(q.shape[0], -1)[:, None, None]
    out, lse = lsh_sampling_reference(q, k, v, sampled, u, exact, call.scale)
    return out.to(dtype), lse


SAMPLING = {
    "triton": Implementation(_triton_attention),
    "reference": Implementation(_reference_attention),
}
