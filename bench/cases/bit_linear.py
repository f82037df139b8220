"""The trainable ternary linear, forward and backward over the tokens of one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Provider, Settings, Work
from bench.peers import from_transformers
from bench.recorded import recorded
from bitnet_triton.kernels import bit_linear, quantize_weight
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference

_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Inputs:
    """One point: x [M, K], master weight [N, K], incoming gradient dy [M, N]."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    backward: bool


def make_inputs(M: int, K: int, N: int, settings: Settings, passes: str) -> Inputs:
    """Draw everything from normal distributions."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=settings.device).to(settings.dtype)

    random = settings.generator
    return Inputs(randn(M, K), randn(N, K) * K**-0.5, randn(M, N), passes == "forward+backward")


def _outputs(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor | None
) -> dict[str, Tensor]:
    if dy is None:
        return {"y": function(x, weight)}
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = function(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def _work(inputs: Inputs, function: Callable, weight: Tensor | None = None) -> Work:
    x, dy = inputs.x, inputs.dy if inputs.backward else None
    weight = inputs.weight if weight is None else weight
    passes = 3 if inputs.backward else 1
    moved = passes * (x.nbytes + weight.nbytes + inputs.dy.nbytes)
    return Work(
        call=lambda: _outputs(function, x, weight, dy),
        read_bytes=moved,
        grad=inputs.backward,
        details={"saved_for_backward_bytes": _saved_bytes(function, x, weight, inputs.backward)},
    )


def _saved_bytes(function: Callable, x: Tensor, weight: Tensor, backward: bool) -> int | None:
    """Return the bytes that autograd keeps between forward and backward, weights apart."""
    if not backward:
        return None
    storages: dict[int, int] = {}

    def remember(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() != weight.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    x, leaf = (t.detach().requires_grad_() for t in (x, weight))
    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda saved: saved),
        torch.enable_grad(),
    ):
        y = function(x, leaf)
    del y
    return sum(storages.values())


def _dense(inputs: Inputs) -> Work:
    # On the quantised weight, so that outputs and gradients are those of the other providers
    codes, scale = quantize_weight(inputs.weight)
    return _work(inputs, F.linear, (codes * scale).to(inputs.x.dtype))


def _transformers(inputs: Inputs) -> Work:
    layer_class = from_transformers("AutoBitLinear")
    N, K = inputs.weight.shape
    with torch.device("meta"):
        layer = layer_class(K, N, bias=False, dtype=inputs.weight.dtype, online_quant=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    return _work(inputs, run)


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    dy = inputs.dy.float() if inputs.backward else None
    with torch.enable_grad():
        return _outputs(bit_linear_reference, inputs.x.float(), inputs.weight.float(), dy)


def case() -> Case:
    """Return the case."""
    ours = Provider("bitnet_triton", lambda i: _work(i, bit_linear), _TOLERANCE, "int8")
    dense = Provider("F.linear", _dense, _TOLERANCE, "bf16", "nothing is quantised")
    return Case(
        name="bit_linear",
        title="Trainable ternary linear",
        grid=[
            {"passes": passes, "M": 2048, "K": 2560, "N": 6912}
            for passes in ("forward", "forward+backward")
        ],
        inputs=make_inputs,
        reference=_reference,
        providers={
            "bitnet_triton": ours,
            "torch_bf16": dense,
            "transformers": Provider(
                "hf AutoBitLinear", _transformers, _TOLERANCE, "bf16", "transformers, online"
            ),
            # from Python, a GPU's launches take longer than what they start
            "bitnet_triton_recorded": recorded(ours),
            "torch_bf16_recorded": recorded(dense),
        },
        baselines=("torch_bf16", "transformers", "torch_bf16_recorded"),
        flops=lambda passes, M, K, N: (3 if passes == "forward+backward" else 1) * 2 * M * K * N,
        panels=(("M", "K", "N"), ("passes",)),
    )
