"""One packed ternary linear of BitNet b1.58 2B-4T, as in decoding and in prefill.

A decode step reads every weight of the model once, so its weights never come from a cache. The
"cold" rows measure that: each provider goes round over so many copies of its weights that together
they exceed the last-level cache four times. The "hot" rows use one copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.machine import copies_beyond_cache
from bench.peers import from_transformers
from bench.recorded import in_turn
from bitnet_triton import use_backend
from bitnet_triton.kernels import (
    TernaryWeight,
    quantize_activations,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.kernels.packing import pack_codes
from bitnet_triton.kernels.ternary_linear.launchers import TERNARY_FWD
from bitnet_triton.kernels.ternary_linear.reference import ternary_linear_reference
from bitnet_triton.runtime import explain

SHAPES = ((2560, 2560), (2560, 6912), (6912, 2560))  # (K, N)

# STYLE: our own ops stay this close to float64; peers round the integer sum or skip the quantiser
OWN_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PEER_TOLERANCE = 2e-2
# of a GPU's graph
_FEW_TOKENS, _MOST_CALLS = 16, 64


@dataclass(frozen=True)
class Inputs:
    """One point: activations x [M, K], codes [N, K], the scale of the weights."""

    x: Tensor
    codes: Tensor
    scale: float
    cold: bool


def make_inputs(M: int, K: int, N: int, settings: Settings, cache: str = "hot") -> Inputs:
    """Draw x from a normal distribution and each code from -1, 0, 1 with equal chance."""
    random = {"generator": settings.generator, "device": settings.device}
    x = torch.randn((M, K), **random).to(settings.dtype)
    codes = torch.randint(-1, 2, (N, K), dtype=torch.int8, **random)
    return Inputs(x, codes, K**-0.5, cache == "cold")


def _work(
    inputs: Inputs,
    x: Tensor,
    make: Callable[[], Any],
    held_bytes: int,
    run: Any,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Work:
    """Let ``run(x, weight)`` go round over as many weights as the point asks for.

    Args:
        inputs: of the point.
        x: what is multiplied.
        make: makes a weight.
        held_bytes: of one weight.
        run: the product.
        finish: makes what is compared of what it gives.
    """
    copies = copies_beyond_cache(held_bytes, x.device) if inputs.cold else 1
    weights = [make() for _ in range(copies)]
    moved = x.nbytes + x.shape[0] * inputs.codes.shape[0] * x.element_size()
    work = Work(
        call=lambda: run(x, weights[0]),
        output=None if finish is None else lambda: finish(run(x, weights[0])),
        read_bytes=held_bytes + moved,
        details={"weight_bytes": held_bytes, "copies": copies},
    )
    # of many tokens a product is long, and no weight is bound to stay in a cache
    most = _MOST_CALLS if x.shape[0] <= _FEW_TOKENS else 2
    calls = [lambda weight=weight: run(x, weight) for weight in weights]
    return in_turn(calls, x.device, work, most=most)


def backend(device: torch.device) -> str:
    """Name the backend that ours runs on, "triton on cpu" for instance."""
    objections = explain("ternary_linear", TERNARY_FWD, device)
    chosen = next((name for name, objection in objections if objection is None), "none")
    return f"{chosen} on {device.type}"


def _ours(forced: str | None = None) -> Callable[[Inputs], Work]:
    """Return what builds ours, on the backend that it chooses or on one that is forced."""

    def run_forced(x: Tensor, weight: TernaryWeight) -> Tensor:
        with use_backend(forced):
            return ternary_linear(x, weight)

    def build(inputs: Inputs) -> Work:
        def make() -> TernaryWeight:
            return TernaryWeight.from_codes(inputs.codes, inputs.scale)

        run = ternary_linear if forced is None else run_forced
        work = _work(inputs, inputs.x, make, inputs.codes.numel() // 4, run)
        device = inputs.x.device
        ran = backend(device) if forced is None else f"{forced} on {device.type}"
        return dataclasses.replace(work, details={**work.details, "backend": ran})

    return build


def _dense(dtype: torch.dtype) -> Callable[[Inputs], Work]:
    def build(inputs: Inputs) -> Work:
        weight = inputs.codes.to(dtype) * inputs.scale
        return _work(inputs, inputs.x.to(dtype), weight.clone, weight.nbytes, F.linear)

    return build


def _ours_quantized(inputs: Inputs) -> Work:
    codes, scale = quantize_activations(inputs.x)
    sums, dtype = codes.sum(-1, dtype=torch.int32), inputs.x.dtype
    return _work(
        inputs, inputs.x, lambda: TernaryWeight.from_codes(inputs.codes, inputs.scale),
        inputs.codes.numel() // 4,
        lambda _, weight: ternary_linear_quantized(codes, scale, sums, weight, dtype=dtype),
    )  # fmt: skip


def _int_mm(inputs: Inputs) -> Work:
    if inputs.x.device.type == "cuda" and inputs.x.shape[0] <= 16:
        raise PeerMissingError("torch._int_mm takes more than 16 rows on a GPU")
    codes, scale = quantize_activations(inputs.x)
    return _work(
        inputs, inputs.x, inputs.codes.clone, inputs.codes.nbytes,
        lambda _, weight: torch._int_mm(codes, weight.t()),
        lambda y: y.double() * scale.double() * inputs.scale,
    )  # fmt: skip


def _transformers(inputs: Inputs) -> Work:
    layer_class = from_transformers("BitLinear")
    N, K = inputs.codes.shape
    packed = pack_codes(inputs.codes)

    def make() -> torch.nn.Module:
        layer = layer_class(K, N, bias=False, device=inputs.x.device, dtype=inputs.x.dtype)
        layer.weight.copy_(packed)
        layer.weight_scale.fill_(1 / inputs.scale)  # this class divides by it
        return layer

    return _work(inputs, inputs.x, make, packed.nbytes, lambda x, layer: layer(x))


def _transformers_eager(inputs: Inputs) -> Work:
    """Run the layer without the torch.compile that transformers wraps around its parts."""
    compiled = _transformers(inputs)
    eager = torch.compiler.set_stance("force_eager")(compiled.call)
    return dataclasses.replace(compiled, call=eager)


def _grid() -> list[dict[str, Any]]:
    rows = [(1, "cold"), *((M, "hot") for M in (1, 2, 4, 8, 16, 32, 512))]
    return [{"M": M, "cache": cache, "K": K, "N": N} for M, cache in rows for K, N in SHAPES]


def _reference(inputs: Inputs) -> Tensor:
    return ternary_linear_reference(inputs.x.float(), inputs.codes.float(), inputs.scale)


def case() -> Case:
    """Return the case."""
    own = max(OWN_TOLERANCE.values())
    unquantised = "x is not quantised"
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    runs_on = "backend: " + ", ".join(backend(torch.device(device)) for device in devices)
    return Case(
        name="ternary_linear",
        title="Ternary linear, 2-bit weights x int8 activations",
        grid=_grid(),
        inputs=make_inputs,
        reference=_reference,
        providers={
            "bitnet_triton": Provider("bitnet_triton", _ours(), own, "int8", runs_on),
            "torch_bf16": Provider(
                "F.linear bf16", _dense(torch.bfloat16), PEER_TOLERANCE, "bf16", unquantised
            ),
            "torch_fp32": Provider(
                "F.linear fp32", _dense(torch.float32), PEER_TOLERANCE, "fp32", unquantised
            ),
            "transformers": Provider(
                "hf BitLinear", _transformers, PEER_TOLERANCE, "bf16",
                "transformers, unpacks on each call",
            ),
            "transformers_eager": Provider(
                "hf BitLinear, eager", _transformers_eager, PEER_TOLERANCE, "bf16",
                "without its torch.compile", default=False,
            ),
            "bitnet_triton_quantized": Provider(
                "bitnet_triton, x quantised", _ours_quantized, own, "int8",
                "as after a norm that quantises", default=False,
            ),
            "torch_int8": Provider(
                "torch._int_mm", _int_mm, own, "int8",
                "int8 weights, x quantised, int32 sums only", default=False,
            ),
            "compile": Provider(
                "bitnet_triton compile", _ours("compile"), own, "int8", "forced", default=False
            ),
            "reference": Provider(
                "bitnet_triton reference", _ours("reference"), own, "fp32", "forced",
                default=False,
            ),
        },
        baselines=("torch_bf16", "transformers", "torch_int8"),
        flops=lambda M, K, N, cache: 2 * M * K * N,
        panels=(("M", "cache"), ("K", "N")),
    )  # fmt: skip
