"""Decoding by a sample of the keys beside decoding by all of them: time, error, and the byte bound.

Keys come in topics: neighbours are alike, heads of a group ask for much the same, and a query likes
some topics; part of the weight lies on few keys and the rest is spread. Every call takes the next
query of a ring, each with a sample and a recorded step of its own, so that rows come from memory
and not from the cache of the call before. All steps are recorded, as in a model. Nothing that
samples is compared with a tolerance: its error against dense attention stands in its details, with
the share of rows that were read, the most that reading fewer bytes could gain, and what tables hold
and take to make.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Point, Provider, Settings, Work
from bitnet_triton.kernels import HashTables, Mask, flash_attention, pool_keys
from bitnet_triton.runtime import capture

_QUERIES = 32  # together they read far more than a processor's cache holds, from 32k rows on
_TOPIC = 64  # neighbouring tokens
_TOLERANCE = 8e-3
_SINKS, _RECENT = 4, 64
# bits and tables: 2 to 5 % of the rows by the paper
BUDGETS = {
    "10x150": (10, 150),
    "10x170": (10, 170),
    "9x90": (9, 90),
    "8x45": (8, 45),
    "8x48": (8, 48),
    "9x120": (9, 120),
    "8x75": (8, 75),
}
# epsilon, delta, tails
BOUNDS = {
    "0.2_normal": (0.2, 0.05, "normal"),
    "0.1_normal": (0.1, 0.05, "normal"),
    "0.1_sampled": (0.1, 0.05, "sampled"),
    "0.05_normal": (0.05, 0.05, "normal"),
    "0.1_normal_delta_0.1": (0.1, 0.1, "normal"),
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """One point: queries [1 1 H D]; k, v [1 T Hk D]."""

    queries: list[Tensor]
    k: Tensor
    v: Tensor
    scale: float

    @property
    def dense(self) -> Tensor:
        """What dense attention gives for all queries."""
        outs = [flash_attention(q, self.k, self.v, scale=self.scale) for q in self.queries]
        return torch.cat(outs)

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows of keys and values."""
        return self.k.nbytes + self.v.nbytes


def make_inputs(T: int, H: int, Hk: int, D: int, settings: Settings) -> Inputs:
    """Draw keys by topics, and queries that like some of them."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=settings.device)

    random, topics = settings.generator, -(-T // _TOPIC)
    topic = randn(1, topics, Hk, D)
    k = 0.7 * topic.repeat_interleave(_TOPIC, 1)[:, :T] + 0.7 * randn(1, T, Hk, D)
    k += randn(1, 1, Hk, D)  # what all keys share
    v = randn(1, T, Hk, D) + randn(1, topics, Hk, D).repeat_interleave(_TOPIC, 1)[:, :T]
    queries = []
    for _ in range(_QUERIES):
        chosen = torch.randint(topics, (4,), generator=random, device=settings.device)
        liked = topic[:, chosen].mean(1)[:, :, None] * 2
        q = liked + 0.8 * randn(1, Hk, 1, D) + 0.5 * randn(1, Hk, H // Hk, D)
        queries.append(q.flatten(1, 2)[:, None].to(settings.dtype))
    # as a cache holds them
    k, v = (t.to(settings.dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    return Inputs(queries, k, v, D**-0.5)


def _recorded(inputs: Inputs, run: Callable[[Tensor], tuple[Tensor, ...]], work: Work) -> Work:
    """Let each call replay the step of the next query."""
    outs, graphs = [], []
    with torch.no_grad(), torch.inference_mode(False):
        for q in inputs.queries:
            run(q)  # compiled and loaded
            with capture(q.device) as graph:
                outs.append(run(q)[0])
            graphs.append(graph)
    turns = cycle(graphs)

    def output() -> Tensor:
        for graph in graphs:
            graph.replay()
        return torch.cat(outs)

    return dataclasses.replace(work, call=lambda: next(turns).replay(), output=output)


def _dense(inputs: Inputs) -> Work:
    from bitnet_triton.kernels.flash_attention.decode import launch_decode

    def run(q: Tensor) -> tuple[Tensor, ...]:
        return launch_decode(q, inputs.k, inputs.v, mask=Mask(), scale=inputs.scale)

    return _recorded(inputs, run, Work(lambda: None, read_bytes=inputs.row_bytes))


def _report(inputs: Inputs, work: Work, rows: float, lists: int, more: dict[str, Any]) -> Work:
    """Add what a sample has to say of itself: ``rows`` of one list, of so many lists."""
    assert work.output is not None
    found, dense = work.output().double(), inputs.dense.double()
    T, Hk = inputs.k.shape[1:3]
    read = rows * lists * inputs.row_bytes / (T * Hk)
    details = {
        "rows_share": rows / T, "error": ((found - dense).norm() / dense.norm()).item(),
        "most_speedup": inputs.row_bytes / read, **more,
    }  # fmt: skip
    return dataclasses.replace(work, read_bytes=int(read), details=details)


@functools.lru_cache(maxsize=1)
def _tables(inputs: Inputs, bits: int, tables: int) -> tuple[HashTables, float]:
    HashTables.build(inputs.k[:, :256], bits=bits, tables=tables)  # kernels are compiled
    start = time.perf_counter()
    built = HashTables.build(inputs.k, bits=bits, tables=tables)
    if inputs.k.is_cuda:
        torch.cuda.synchronize()
    return built, time.perf_counter() - start


def _lsh(inputs: Inputs, bits: int, tables: int, share: str) -> Work:
    from bitnet_triton.kernels.lsh_sampling.launchers import triton_sampling

    group = inputs.queries[0].shape[2] // inputs.k.shape[2]
    built, seconds = _tables(inputs, bits, tables * (group if share == "union" else 1))
    call = built.call(share, sinks=_SINKS, recent=_RECENT, scale=inputs.scale)

    def run(q: Tensor) -> tuple[Tensor, ...]:
        return triton_sampling(q, inputs.k, inputs.v, call)

    sampled = [built.sampled(q, share=share)[..., _SINKS:-_RECENT].sum(-1) for q in inputs.queries]
    rows = torch.stack(sampled).double().mean().item() + _SINKS + _RECENT
    lists = inputs.queries[0].shape[2] if share == "own" else inputs.k.shape[2]
    more = {"table_bytes": built.nbytes, "build_s": seconds}
    return _report(inputs, _recorded(inputs, run, Work(lambda: None)), rows, lists, more)


def _verified(inputs: Inputs, epsilon: float, delta: float, tails: str) -> Work:
    from bitnet_triton.kernels.lsh_sampling.verified import Verified, triton_verified, units_of

    page, selected, base = 32, 32, 256
    bounds = pool_keys(inputs.k, units=units_of(page))

    def run(q: Tensor) -> tuple[Tensor, ...]:
        call = Verified(
            bounds, None, None, page, selected, 1, 3, base, 1, tails, epsilon, delta, inputs.scale
        )
        return triton_verified(q, inputs.k, inputs.v, call)

    with torch.no_grad():
        counts = torch.stack([run(q)[2] for q in inputs.queries]).double()
    # of the base rows only keys are read
    rows = counts.mean().item() + page * selected + base / 2
    most = (counts.max().item() + page * selected) / inputs.k.shape[1]
    more = {"table_bytes": bounds.nbytes, "rows_share_most": most}
    work = _recorded(inputs, run, Work(lambda: None))
    return _report(inputs, work, rows, inputs.k.shape[2], more)


def _grid() -> list[Point]:
    # the attention of the published 2B model
    heads = {"H": 20, "Hk": 5, "D": 128}
    return [{"T": T, **heads} for T in (8192, 32768, 98304, 131072)]


def _flops(T: int, H: int, Hk: int, D: int) -> float:
    """Count those of dense attention."""
    return 4.0 * T * D * H


def case() -> Case:
    """Return the case."""
    providers = {"dense": Provider("flash_attention", _dense, _TOLERANCE, note="all rows")}
    notes = {
        "own": "a sample for each query head",
        "union": "the samples of a group are shared; tables for each head",
        "proposal": "one sample a group, by the mean direction",
    }
    for budget, (bits, tables) in BUDGETS.items():
        for share, note in notes.items():
            # tables for each head are larger than the cache: to be named
            providers[f"lsh_{share}_{budget}"] = Provider(
                f"lsh_sampling {share}, {bits} bits, {tables} tables",
                functools.partial(_lsh, bits=bits, tables=tables, share=share),
                None, note=note, default=share != "union",
            )  # fmt: skip
    for bound, (epsilon, delta, tails) in BOUNDS.items():
        providers[f"verified_{bound}"] = Provider(
            f"verified_sampling, epsilon {epsilon}, delta {delta}, {tails} tails",
            functools.partial(_verified, epsilon=epsilon, delta=delta, tails=tails), None,
            note="1024 rows of pages, and a sample as large as the error asks for",
        )  # fmt: skip
    return Case(
        name="sampling",
        title="Decoding by a sample of the keys",
        grid=_grid(),
        inputs=make_inputs,
        reference=lambda inputs: inputs.dense,
        providers=providers,
        baselines=("dense",),
        flops=_flops,
        panels=(("H", "Hk", "D"), ()),
        curve="T",
    )  # fmt: skip
