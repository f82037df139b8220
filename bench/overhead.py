"""What a step of ``generate`` costs outside of its kernels: ``python -m bench.overhead``.

A fused model of 2B-4T shapes writes a few tokens and then many: the difference is steps. Inside of
them, the replay of the recorded launches and the output head are timed; the rest is Python: the
model around its recording, and the loop of ``generate``. Taking the best token from logits, and
their copy in float32, would belong to that loop; in greedy decoding the output head does it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.case import Settings
from bench.models import SHAPES, RandomModels, Shape
from bitnet_triton.triton_cpu.graph import Graph

_FEWEST, _PROMPT = 4, 64

console = Console(highlight=False)


@contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float], key: str) -> Iterator[None]:
    """Add up the time that a method takes while the block runs."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - start

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _step(generate: Callable[[int], Any], model: Any, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step, and of its parts."""
    found = []
    for tokens in (_FEWEST, _FEWEST + steps):
        spent = dict.fromkeys(("replay", "head", "decoder", "step"), 0.0)
        with (
            _timed(Graph, "replay", spent, "replay"),
            # not its forward: a head whose forward is replaced writes logits
            _timed(type(model.lm_head), "topk", spent, "head"),
            _timed(type(model.model), "forward", spent, "decoder"),
        ):
            start = time.perf_counter()
            generate(tokens)
            spent["step"] = time.perf_counter() - start
        found.append(spent)
    few, many = found
    per_step = {key: (many[key] - few[key]) * 1e3 / steps for key in few}
    kernels = per_step["replay"] + per_step["head"]
    return {
        "step": per_step["step"],
        "layers": per_step["replay"],
        "head": per_step["head"],
        "Python in the model": per_step["decoder"] - per_step["replay"],
        "Python in generate": per_step["step"] - per_step["decoder"] - per_step["head"],
        "share of Python": 100 * (1 - kernels / per_step["step"]),
    }


def overhead(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps in a round.")] = 48,
    rounds: Annotated[int, typer.Option(help="The median of so many rounds counts.")] = 5,
    shape: Annotated[str, typer.Option(help="`2b4t`, or `tiny` to see whether it runs.")] = "2b4t",
    int8_head: Annotated[bool, typer.Option("--int8-head", help="The head in 8 bits.")] = False,
) -> None:
    """Print what a decode step costs outside of its kernels, in milliseconds."""
    torch.set_num_threads(threads)
    widths = Shape(**{**SHAPES[shape].__dict__, "layers": layers})
    models = RandomModels(widths, Settings(device=torch.device("cpu")))
    model: Any = models.get("int8_head" if int8_head else "fused")
    ids = torch.randint(2, widths.vocab, (1, _PROMPT))

    def generate(tokens: int) -> Any:
        with torch.inference_mode():
            return model.generate(
                ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=1
            )

    generate(_FEWEST)  # compiles
    found = [_step(generate, model, steps) for _ in range(rounds)]
    for key in found[0]:
        values = sorted(row[key] for row in found)
        unit = "%" if key.startswith("share") else "ms"
        console.print(f"{key:22} {median(values):8.3f} {unit}  ({values[0]:.3f}-{values[-1]:.3f})")


if __name__ == "__main__":
    typer.run(overhead)
