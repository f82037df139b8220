"""The output head of BitNet b1.58 2B-4T: 128256 x 2560, a third of the bytes of a token.

Its weight is larger than any cache, so that every call reads it from memory. Rows with
"output=best" want the largest logit and its token alone, as greedy decoding does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Provider, Settings, Work
from bench.peers import TORCHAO
from bitnet_triton.kernels import (
    Int8Weight,
    dense_linear,
    dense_linear_topk,
    int8_linear,
    int8_linear_topk,
)

_TOLERANCE = 8e-3
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Inputs:
    """One point: x [M, K], a weight [N, K] that int8 holds exactly, and what is asked for."""

    x: Tensor
    weight: Int8Weight
    best: bool


def make_inputs(M: int, K: int, N: int, settings: Settings, output: str) -> Inputs:
    """Draw x from a normal distribution, codes evenly, scales so that outputs are about 1."""
    random = {"generator": settings.generator, "device": settings.device}
    x = torch.randn((M, K), **random).to(settings.dtype)
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, **random)
    scale = (0.5 + torch.rand((N,), **random)) * K**-0.5 / 73
    return Inputs(x, Int8Weight(codes, scale), output == "best")


def _dense(inputs: Inputs) -> Tensor:
    """Return the weight in the dtype of x, made of a few rows at a time."""
    N, K = inputs.weight.shape
    dense = torch.empty((N, K), dtype=inputs.x.dtype, device=inputs.x.device)
    parts = (t.split(_ROWS_AT_ONCE) for t in (dense, inputs.weight.codes, inputs.weight.scale))
    for rows, codes, scale in zip(*parts):
        rows.copy_(codes * scale[:, None])
    return dense


def _work(
    inputs: Inputs,
    held_bytes: int,
    logits: Callable[[Tensor], Tensor],
    best: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Work:
    """Let a provider give logits, or the best of them: in one step, or from the logits."""
    x = inputs.x

    def from_logits(x: Tensor) -> tuple[Tensor, Tensor]:
        y = logits(x)
        tokens = y.argmax(-1, keepdim=True)
        return y.gather(-1, tokens), tokens

    if not inputs.best:
        written = x.shape[0] * inputs.weight.shape[0] * x.element_size()
        return Work(call=lambda: logits(x), read_bytes=held_bytes + x.nbytes + written)
    run = best or from_logits
    return Work(call=lambda: run(x), output=lambda: run(x)[0], read_bytes=held_bytes + x.nbytes)


def _ours(inputs: Inputs) -> Work:
    weight = inputs.weight
    return _work(
        inputs, weight.codes.nbytes + weight.scale.nbytes,
        lambda x: int8_linear(x, weight), lambda x: int8_linear_topk(x, weight),
    )  # fmt: skip


def _ours_dense(inputs: Inputs) -> Work:
    weight = _dense(inputs)
    return _work(
        inputs, weight.nbytes,
        lambda x: dense_linear(x, weight), lambda x: dense_linear_topk(x, weight),
    )  # fmt: skip


def _torch_dense(inputs: Inputs) -> Work:
    weight = _dense(inputs)
    return _work(inputs, weight.nbytes, lambda x: F.linear(x, weight))


def _torch_int8(inputs: Inputs) -> Work:
    x, weight = inputs.x, inputs.weight
    multiply = torch.ops.aten._weight_int8pack_mm
    scale = weight.scale.to(x.dtype)
    try:
        multiply(x[:1], weight.codes[:32], scale[:32])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerMissingError(f"torch has no int8 weights here: {reason}") from None
    return _work(
        inputs, weight.codes.nbytes + scale.nbytes, lambda x: multiply(x, weight.codes, scale)
    )


def _torchao(inputs: Inputs) -> Work:
    """Let torchao quantise the weight anew: each row has a scale, as ours."""
    TORCHAO.need()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    N, K = inputs.weight.shape
    layer = torch.nn.Linear(K, N, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(_dense(inputs), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    return _work(inputs, N * K + N * inputs.x.element_size(), layer)


def _reference(inputs: Inputs) -> Tensor:
    x, weight = inputs.x.float(), inputs.weight
    parts = zip(weight.codes.split(_ROWS_AT_ONCE), weight.scale.split(_ROWS_AT_ONCE))
    y = torch.cat([x @ (codes * scale[:, None]).t() for codes, scale in parts], dim=1)
    return y.amax(-1, keepdim=True) if inputs.best else y


def case() -> Case:
    """Return the case."""
    dense = "nothing is quantised"
    return Case(
        name="int8_linear",
        title="Output head in eight bits a weight",
        grid=[
            {"output": output, "M": M, "K": 2560, "N": 128256}
            for output, tokens in (("logits", (1, 2, 4, 16, 64)), ("best", (1, 4)))
            for M in tokens
        ],
        inputs=make_inputs,
        reference=_reference,
        providers={
            "bitnet_triton": Provider("bitnet_triton int8", _ours, _TOLERANCE, "int8"),
            "bitnet_triton_dense": Provider(
                "bitnet_triton bf16", _ours_dense, _TOLERANCE, "bf16", dense
            ),
            "torch_bf16": Provider("F.linear", _torch_dense, _TOLERANCE, "bf16", dense),
            "torch_int8": Provider(
                "torch int8", _torch_int8, 2e-2, "bf16",
                "_weight_int8pack_mm, its scales in the dtype of x",
            ),
            "torchao": Provider(
                "torchao int8", _torchao, 2e-2, "bf16", "Int8WeightOnlyConfig, not compiled"
            ),
        },
        baselines=("bitnet_triton_dense", "torch_bf16"),
        flops=lambda output, M, K, N: 2 * M * K * N,
        panels=(("output", "K", "N"), ("M",)),
    )  # fmt: skip
