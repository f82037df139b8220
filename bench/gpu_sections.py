"""What ``python -m bench.gpu_suite`` times: cases of this folder, on points for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.case import Case, Point
from bench.cases import (
    bit_linear,
    decode_steps,
    flash_attention,
    generate,
    int8_linear,
    ternary_linear,
)

# (K, N): the linears of BitNet b1.58 2B-4T, merged where they share an input; of larger models
_SHAPES = ((2560, 6912), (6912, 2560), (2560, 3840), (2560, 13824), (2560, 2560))
_LARGE = ((4096, 14336), (14336, 4096))
_LARGER = (8192, 28672)


@dataclass(frozen=True)
class Section:
    """A case, its points and providers.

    Attributes:
        name: on the command line.
        case: makes the case, of the shape "2b4t" or "tiny".
        points: on a GPU, the most important ones first.
        small: on a CPU: to see that it runs, not to measure.
        providers: by name; ours are forced onto the Triton backend where ``forced``.
        quick: how many points stay in a quick run.
        slow: providers that compile for long: not in a quick run.
        weight: its share of the time, relative to the sections after it; what it leaves is theirs.
        guess_s: how long its first point may take, compilation included.
        most_s: it never gets more time than this.
        forced: False where a part has no kernel.
    """

    name: str
    case: Callable[[str], Case]
    points: Sequence[Point]
    small: Sequence[Point]
    providers: tuple[str, ...]
    quick: int = 1
    slow: tuple[str, ...] = ()
    weight: float = 4
    guess_s: float = 10
    most_s: float = math.inf
    forced: bool = True


def _linears(rows: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[Point]:
    return [{"M": M, "cache": "cold", "K": K, "N": N} for M in rows for K, N in shapes]


def _attention(passes: str) -> list[Point]:
    masks = [("causal", 128), ("window_4096", 128), ("causal", 64), ("window_4096", 64)]
    long = {"passes": passes, "dtype": "bf16", "T": 16384, "H": 16, "Hk": 16}
    points: list[Point] = [{**long, "mask": m, "D": D} for m, D in [*masks, ("full", 128)]]
    grouped = {"T": 4096, "H": 20, "Hk": 5, "D": 128, "B": 4}
    return [*points, {**long, "mask": "causal", **grouped}]


def _small_attention(passes: str) -> list[Point]:
    heads = {"dtype": "bf16", "T": 130, "H": 4, "Hk": 2, "D": 32}
    masks = ("causal",) if passes == "decode" else ("causal", "window_40")
    return [{"passes": passes, "mask": mask, **heads} for mask in masks]


def _decode() -> list[Point]:
    heads = {"passes": "decode", "mask": "causal", "dtype": "bf16", "H": 20, "Hk": 5, "D": 128}
    sizes = [(1, 32768), (1, 4096), (16, 4096), (1, 131072)]
    return [{**heads, "T": T, "B": B} for B, T in sizes]


def _trained(rows: Sequence[int], K: int, N: int) -> list[Point]:
    return [{"passes": "forward+backward", "M": M, "K": K, "N": N} for M in rows]


# cold caches take copies of the weights, and smaller ones take a hundred thousand of them
_SMALL = [(1024, 768), (768, 512)]

_PRODUCTS = ("bitnet_triton", "bitnet_triton_quantized", "torch_bf16", "torch_int8")
_TRAINED = ("bitnet_triton_recorded", "torch_bf16_recorded", "bitnet_triton", "torch_bf16")
_ATTENTION = ("bitnet_triton", "sdpa_flash", "sdpa_cudnn", "flex")

SECTIONS = (
    Section(
        "prefill", lambda _: ternary_linear.case(),
        _linears([4096], [_LARGE[0], *_SHAPES, _LARGE[1]]), _linears([24], _SMALL),
        _PRODUCTS, quick=2, weight=6,
    ),
    Section(
        "gemv", lambda _: ternary_linear.case(),
        [
            *_linears([1, 16], _LARGE[:1]), *_linears([1, 16], [_LARGE[1], _LARGER]),
            *_linears([2, 4, 8], [*_LARGE, _LARGER]), *_linears([1, 4, 16], _SHAPES),
        ],
        _linears([1, 2, 4, 8, 16], _SMALL[:1]), _PRODUCTS, quick=2, weight=6,
    ),
    Section(
        "head", lambda _: int8_linear.case(),
        [{"output": "logits", "M": M, "K": 2560, "N": 128256} for M in (1, 4)],
        [{"output": "logits", "M": 2, "K": 64, "N": 96}], ("bitnet_triton", "torch_bf16"),
    ),
    Section(
        "training", lambda _: bit_linear.case(), _trained([8192, 2048], 2560, 6912),
        _trained([24], 64, 32), _TRAINED,
    ),
    Section(
        "attention", lambda _: flash_attention.case(), _attention("forward"),
        _small_attention("forward"), _ATTENTION, quick=2, slow=("flex",), guess_s=40,
    ),
    Section(
        "attention_backward", lambda _: flash_attention.case(), _attention("backward"),
        _small_attention("backward"), _ATTENTION, quick=2, slow=("flex",), guess_s=60,
    ),
    Section(
        "decode", lambda _: flash_attention.case(), _decode(), _small_attention("decode"),
        ("bitnet_triton", "sdpa"), weight=3,
    ),
    Section(
        "steps", lambda shape: decode_steps.case(shape=shape),
        [{"B": B, "T": T} for B, T in ((1, 512), (8, 512), (1, 4096))],
        [{"B": B, "T": 8} for B in (1, 2)], ("bitnet_triton", "bitnet_triton_in_order"),
        weight=3, guess_s=15, forced=False,
    ),
    # one sequence; eight only if that was done in half of the time
    Section(
        "model", lambda shape: generate.case(shape=shape),
        [{"B": B, "prompt": 16, "new": 512} for B in (1, 8)],
        [{"B": B, "prompt": 8, "new": 4} for B in (1, 2)],
        ("bitnet_triton", "bitnet_triton_dynamic", "transformers"),
        slow=("bitnet_triton", "transformers"), weight=8, guess_s=60, most_s=120, forced=False,
    ),
)  # fmt: skip
