"""Calls that are replayed as one graph on a GPU, where no launch is waited for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.case import Outputs, Provider, Work


def in_turn(
    calls: Sequence[Callable[[], Outputs]], device: torch.device, work: Work, *, most: int = 2**16
) -> Work:
    """Return ``work`` made of many calls, on a GPU replayed as one graph; on a CPU one at a time.

    Args:
        calls: equal in all but the memory that they read, so that nothing comes from a cache.
        device: where they run.
        work: all else about one call; its own call is not used.
        most: calls in a graph.
    """
    if device.type != "cuda":
        turns = _cycle(calls)
        return dataclasses.replace(work, call=lambda: next(turns)())
    calls = calls[:most]
    run = graph(calls)
    output = work.output or (lambda: run()[-1])
    return dataclasses.replace(work, call=run, output=output, calls=len(calls))


def _cycle(calls: Sequence[Callable[[], Outputs]]) -> Any:
    while True:
        yield from calls


def recorded(provider: Provider) -> Provider:
    """Return a provider, to be named, whose call is replayed as a graph on a GPU."""

    def build(inputs: Any) -> Work:
        work = provider.build(inputs)
        if not torch.cuda.is_available():
            return work
        run = graph([work.call], work.grad)
        return dataclasses.replace(work, call=run, output=lambda: run()[0])

    label = f"{provider.label}, recorded"
    return dataclasses.replace(provider, label=label, build=build, default=False)


def graph(
    calls: Sequence[Callable[[], Outputs]], grad: bool = False
) -> Callable[[], list[Outputs]]:
    """Record the calls; return what replays them and returns their outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.set_grad_enabled(grad), torch.cuda.stream(stream):
        calls[0]()  # kernels compile and libraries start before the capture
    torch.cuda.current_stream().wait_stream(stream)
    recording = torch.cuda.CUDAGraph()
    with torch.set_grad_enabled(grad), torch.cuda.graph(recording):
        outputs = [call() for call in calls]

    def replay(_reads: object = calls) -> list[Outputs]:
        # a graph knows addresses only: what the calls read lives as long as it does
        recording.replay()
        return outputs

    return replay
