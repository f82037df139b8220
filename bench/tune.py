"""Measure tiles on this machine, and keep those that are faster than the shipped ones.

From the shipped tiles, every size is halved and doubled in turn; the fastest neighbour is taken as
long as it wins by more than the noise. A candidate has to give what the shipped tiles give before
it is timed, and all candidates of a step take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Settings, Work
from bench.measure import ratios, relative_error
from bench.models import SHAPES
from bench.turns import seconds, time_in_turns
from bitnet_triton import use_backend
from bitnet_triton.kernels import (
    Int8Weight,
    Mask,
    TernaryWeight,
    flash_attention,
    int8_linear,
    quantize_activations,
    ternary_linear_quantized,
)
from bitnet_triton.runtime.autotune import Tiles, head_size, size_classes
from bitnet_triton.runtime.measured import Choice, make_choice, measured_tiles

# Less is noise
LEAST_GAIN = 1.03
_STEPS = 4
_LARGEST_TOKENS = 2048
# of a candidate to the shipped tiles: sums in another order, rounded to 16 bits
_TOLERANCE = 8e-3

Tell = Callable[[str], None]
Call = Callable[[], Tensor]

# name -> linears (N, K), head of the vocabulary (N, K), heads, key heads, size of a head.
# Widths of published models; those of 2B-4T and of the tiny one are the benchmarks' own
MODELS: dict[str, dict[str, Any]] = {
    name: {
        "linears": tuple(shape.linears.values()), "vocab": (shape.vocab, shape.hidden),
        "heads": (shape.heads, shape.kv_heads, shape.hidden // shape.heads),
    }
    for name, shape in SHAPES.items()
} | {
    "llama3-8b": {
        "linears": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
        "vocab": (128256, 4096), "heads": (32, 8, 128),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A shape class of a kernel, and the calls of one model that fall into it.

    Attributes:
        kernel: its name in the table of tiles.
        size: the largest of the class.
        calls: run the kernel, once for each shape.
    """

    kernel: str
    size: int
    calls: Sequence[Call]


@dataclass
class Outcome:
    """What became of a job; plain data, for the JSON."""

    kernel: str
    size: int
    shipped: Tiles
    best: Tiles
    gain: dict[str, float] = field(default_factory=lambda: {"median": 1.0, "p20": 1.0, "p80": 1.0})
    tried: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)


def neighbours(tiles: Tiles, device: torch.device) -> Iterator[Tiles]:
    """Return tiles in which one size is half or twice what it was, or one stage more or less."""
    least = 1 if device.type == "cpu" else 16
    for name, value in tiles.items():
        if isinstance(value, bool):
            continue
        if name == "num_stages":
            values, low, high = (value - 1, value + 1), 1, 6
        elif name == "num_warps":
            values, low, high = (value // 2, value * 2), 1, 16
        else:
            values, low, high = (value // 2, value * 2), least, 2**16
        for other in values:
            if low <= other <= high and _is_possible(found := {**tiles, name: other}):
                yield found


def _is_possible(tiles: Tiles) -> bool:
    """Tell whether a tile of the two largest sizes has no more values than Triton lets one have."""
    *_, second, first = [1, 1, *sorted(v for n, v in tiles.items() if n.startswith("BLOCK"))]
    return first * second <= 2**20


def tune(job: Job, settings: Settings, tell: Tell = lambda _: None) -> Outcome:
    """Climb from the shipped tiles of a class to the fastest that no neighbour beats.

    Args:
        job: the class and its calls.
        settings: how to measure.
        tell: is told about every step.
    """
    shipped = size_classes(job.kernel, settings.device)[job.size]
    place, table = (job.kernel, job.size), measured_tiles(_key(settings.device))
    before = table.pop(place, None)
    outcome = Outcome(job.kernel, job.size, dict(shipped), dict(shipped))
    seen: list[Tiles] = [outcome.best]

    def run(tiles: Tiles) -> list[Tensor]:
        table[place] = tiles
        return [call() for call in job.calls]

    try:
        with torch.no_grad(), use_backend("triton"):
            expected = run(shipped)
            for step in range(_STEPS):
                fresh = [t for t in neighbours(outcome.best, settings.device) if t not in seen]
                seen += fresh
                tell(f"step {step + 1}: {len(fresh)} candidates")
                right = [t for t in fresh if _is_right(t, run, expected, outcome)]
                outcome.tried += len(fresh)
                winner = _fastest([outcome.best, *right], run, settings)
                if winner is None:
                    break
                outcome.best = winner
            if outcome.best != shipped:
                _confirm(outcome, run, settings)
    finally:
        table.pop(place, None)
        if before is not None:
            table[place] = before
    return outcome


def _key(device: torch.device) -> str:
    index = torch.cuda.current_device() if device.type == "cuda" else 0
    return f"cuda:{index}" if device.type == "cuda" else device.type


def _is_right(
    tiles: Tiles, run: Callable[[Tiles], list[Tensor]], expected: list[Tensor], outcome: Outcome
) -> bool:
    """Run a candidate for the first time, which compiles it; note why it is refused."""
    try:
        errors = [relative_error(y, e) for y, e in zip(run(tiles), expected)]
    except Exception as error:  # too much shared memory, too large a tile: not a candidate here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        if max(errors) <= _TOLERANCE:
            return True
        reason = f"relative error {max(errors):.2g}"
    outcome.refused.append({"tiles": tiles, "reason": reason})
    return False


def _times(
    candidates: Sequence[Tiles], run: Callable[[Tiles], list[Tensor]], settings: Settings
) -> list[list[float]]:
    works = {str(i): Work(lambda t=tiles: run(t)) for i, tiles in enumerate(candidates)}
    call_s = {name: min(seconds(work.call) for _ in range(2)) for name, work in works.items()}
    # a round for everybody: the budget is that of one candidate
    settings = replace(settings, budget_s=settings.budget_s * len(works))
    return list(time_in_turns(works, call_s, settings).values())


def _fastest(
    candidates: Sequence[Tiles], run: Callable[[Tiles], list[Tensor]], settings: Settings
) -> Tiles | None:
    """Return the candidate that beats the first one by most, None if none beats it clearly."""
    if len(candidates) == 1:
        return None
    first, *others = _times(candidates, run, settings)
    rounds = min(map(len, [first, *others]))
    gains = [ratios(first[:rounds], times[:rounds])["median"] for times in others]
    best = max(range(len(gains)), key=gains.__getitem__)
    return candidates[best + 1] if gains[best] >= LEAST_GAIN else None


def _confirm(outcome: Outcome, run: Callable[[Tiles], list[Tensor]], settings: Settings) -> None:
    """Time the winner beside the shipped tiles alone; the luckiest of many may be just lucky."""
    shipped, best = _times([outcome.shipped, outcome.best], run, settings)
    rounds = min(len(shipped), len(best))
    outcome.gain = ratios(shipped[:rounds], best[:rounds])
    if outcome.gain["median"] < LEAST_GAIN:
        outcome.best = outcome.shipped


def choices(outcomes: Sequence[Outcome], device: torch.device) -> list[Choice]:
    """Return what is worth keeping."""
    return [make_choice(o.kernel, o.size, device, o.best) for o in outcomes if o.best != o.shipped]


def _ternary(M: int, N: int, K: int, settings: Settings) -> Call:
    random: dict[str, Any] = {"generator": settings.generator, "device": settings.device}
    weight = TernaryWeight.from_codes(
        torch.randint(-1, 2, (N, K), dtype=torch.int8, **random), K**-0.5
    )
    codes, scale = quantize_activations(torch.randn((M, K), **random).to(settings.dtype))
    sums = codes.sum(-1, dtype=torch.int32)
    return lambda: ternary_linear_quantized(codes, scale, sums, weight, dtype=settings.dtype)


def _int8(M: int, N: int, K: int, settings: Settings) -> Call:
    random: dict[str, Any] = {"generator": settings.generator, "device": settings.device}
    weight = Int8Weight.from_dense(torch.randn((N, K), **random))
    x = torch.randn((M, K), **random).to(settings.dtype)
    return lambda: int8_linear(x, weight)


def _attention(T: int, heads: tuple[int, int, int], settings: Settings) -> Call:
    H, Hk, D = heads
    random: dict[str, Any] = {"generator": settings.generator, "device": settings.device}
    q, k, v = (torch.randn((1, T, h, D), **random).to(settings.dtype) for h in (H, Hk, Hk))
    return lambda: flash_attention(q, k, v, mask=Mask())


def _tokens(size: int, sizes: Sequence[int]) -> int:
    """Return how many tokens stand for a class: its largest, or twice the one before it."""
    before = max((s for s in sizes if s < size), default=1)
    return size if size <= _LARGEST_TOKENS else min(_LARGEST_TOKENS, 4 * before)


def jobs(kernel: str, model: str, settings: Settings) -> Iterator[tuple[int, Callable[[], Job]]]:
    """Return the classes of a kernel that a model uses, and what makes their inputs.

    Raises:
        ValueError: the kernel or the model is unknown.
    """
    if kernel not in KERNELS:
        raise ValueError(f"`kernel`: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if model not in MODELS:
        raise ValueError(f"`model`: expected one of {', '.join(MODELS)}, got {model!r}")
    widths = MODELS[model]
    try:
        sizes = list(size_classes(kernel, settings.device))
    except KeyError:  # a kernel of GPUs only
        return
    if kernel == "flash_attention_fwd":
        wanted = head_size(widths["heads"][2], settings.dtype)
        size = next(s for s in sizes if wanted <= s)
        yield (
            size,
            lambda: Job(kernel, size, [_attention(_LARGEST_TOKENS, widths["heads"], settings)]),
        )
        return
    make = _int8 if kernel == "int8_linear_fwd" else _ternary
    shapes = [widths["vocab"]] if make is _int8 else widths["linears"]
    for size in sizes:
        M = _tokens(size, sizes)
        yield (
            size,
            lambda size=size, M=M: Job(
                kernel, size, [make(M, N, K, settings) for N, K in dict.fromkeys(shapes)]
            ),
        )


KERNELS = (
    "ternary_linear_fwd", "ternary_linear_fwd_few", "int8_linear_fwd", "flash_attention_fwd",
)  # fmt: skip


def to_dict(outcome: Outcome) -> Mapping[str, Any]:
    """Return plain data for the JSON."""
    return {**outcome.__dict__, "kept": outcome.best != outcome.shipped}
