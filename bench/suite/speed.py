"""Timings: each point of a case is an item, and its rows are the results."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.case import Case, Outputs, Point, Provider, Work
from bench.machine import copies_beyond_cache
from bench.measure import measure_point
from bench.report import point_name
from bench.suite.plan import Item, Plan, Result
from bitnet_triton import use_backend

OURS = "bitnet_triton"


def is_ours(provider: str) -> bool:
    """Tell whether a provider runs kernels of this package: if it fails, the run fails."""
    return provider.startswith(OURS)


def items(
    case: Case, plan: Plan, quick: Sequence[Point], backend: str | None = "triton"
) -> list[Item]:
    """Return the points of a case as items.

    Args:
        case: the workload.
        plan: how it is measured.
        quick: the points that stay in a quick run.
        backend: is forced on ours: what is timed is a kernel. None where a part has none.
    """
    return [
        Item(
            point_name(point),
            functools.partial(_measure, case, point, plan, backend),
            point in quick,
        )
        for point in case.grid
    ]


def _measure(case: Case, point: Point, plan: Plan, backend: str | None) -> list[Result]:
    providers = case.select_providers([])
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        rows = measure_point(case, point, providers, plan.settings, plan.peaks)
    flops = case.flops(**point)
    results = []
    for row in rows:
        data = row.to_dict()
        data["name"] = f"{point_name(point)}: {row.label}"
        data["peer"] = not is_ours(row.provider)
        data["flops"], data["unit"] = flops, case.unit
        results.append(data)
    return results


def not_when_quick(provider: Provider, plan: Plan) -> Provider:
    """Leave a provider that compiles for half a minute out of a quick run."""
    return dataclasses.replace(provider, default=not plan.quick)


def calls_beyond_cache(held_bytes: int, device: torch.device) -> int:
    """Return how many calls, each with a copy of its weights, one timing goes through."""
    return 2 if device.type == "cpu" else copies_beyond_cache(held_bytes, device)


def in_turn(
    calls: Sequence[Callable[[], Outputs]],
    device: torch.device,
    *,
    read_bytes: int,
    finish: Callable[[Any], Outputs] = lambda output: output,
) -> Work:
    """Return a work of several calls, on a GPU replayed as one graph: no launch is waited for.

    Each call has its own copy of what it reads, so that nothing comes from a cache.

    Args:
        calls: equal in all but the memory that they read.
        device: where they run.
        read_bytes: of one call.
        finish: makes what is compared of what a call returns.
    """
    run = _graph(calls) if device.type == "cuda" else lambda: [call() for call in calls]
    count = len(calls)
    return Work(
        run,
        lambda: finish(run()[-1]),
        read_bytes=count * read_bytes,
        units=count,
        details={"calls": count},
    )


def recorded(provider: Provider, label: str) -> Provider:
    """Return a provider whose call is replayed as a graph on a GPU, as no launch is waited for."""

    def build(inputs: Any) -> Work:
        work = provider.build(inputs)
        if not torch.cuda.is_available():
            return work
        run = _graph([work.call], work.grad)
        return dataclasses.replace(work, call=run, output=lambda: run()[0])

    return dataclasses.replace(provider, label=label, build=build)


def _graph(
    calls: Sequence[Callable[[], Outputs]], grad: bool = False
) -> Callable[[], list[Outputs]]:
    """Record the calls; return what replays them and returns their outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.set_grad_enabled(grad), torch.cuda.stream(stream):
        calls[0]()  # kernels compile and libraries start before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.set_grad_enabled(grad), torch.cuda.graph(graph):
        outputs = [call() for call in calls]

    def replay(_reads: object = calls) -> list[Outputs]:
        # a graph knows addresses only: what the calls read lives as long as it does
        graph.replay()
        return outputs

    return replay
