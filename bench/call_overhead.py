"""What a call of flash_attention costs beside its launches: ``python -m bench.call_overhead``.

The launches of a call are written down and run again with the same arguments; a call takes longer
by what Python does around them. Both are counted in CPU time of one thread, which other programs on
the machine disturb less than the clock on the wall. The least of several rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bitnet_triton.kernels import flash_attention
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.aot import record_launches

H, HK, D = 4, 2, 32

console = Console(highlight=False)


def _microseconds(run: Callable[[], Any], calls: int, rounds: int) -> list[float]:
    run()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        found.append((time.process_time() - start) / calls * 1e6)
    return sorted(found)


def call_overhead(
    tokens: Annotated[int, typer.Option(help="Keys.")] = 64,
    calls: Annotated[int, typer.Option(help="Calls in a round.")] = 500,
    rounds: Annotated[int, typer.Option(help="Rounds; the fastest counts.")] = 15,
) -> None:
    """Print the microseconds of a call, of its launches, and of what is around them."""
    torch.set_num_threads(1)
    kinds = (("prefill", tokens, False), ("decode", 1, False), ("training", tokens, True))
    for name, queries, trains in kinds:
        q = torch.randn(1, queries, H, D, requires_grad=trains)
        k, v = (torch.randn(1, tokens, HK, D) for _ in "kv")
        with torch.no_grad(), record_launches() as launches:
            flash_attention(q, k, v)

        def again(launches: list[Any] = launches) -> None:
            for one in launches:
                launch(one.kernel, one.grid)(*one.args, **one.options)

        with torch.set_grad_enabled(trains):
            bare = _microseconds(again, calls, rounds)
            whole = _microseconds(lambda q=q, k=k, v=v: flash_attention(q, k, v), calls, rounds)
        console.print(
            f"{name:9} call {whole[0]:6.1f} us, launches {bare[0]:6.1f}, beside them "
            f"{whole[0] - bare[0]:6.1f} (medians {whole[rounds // 2]:.1f}, {bare[rounds // 2]:.1f})"
        )


if __name__ == "__main__":
    typer.run(call_overhead)
