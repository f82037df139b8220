"""Linear attention by the gated delta rule: long texts forward and backward, and steps of decoding.

Results are checked against float64 on the first head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Point, Provider, Settings, Work
from bench.memory import peak_extra_bytes
from bitnet_triton.kernels import flash_attention, linear_attention
from bitnet_triton.kernels.linear_attention.reference import chunked_reference
from bitnet_triton.kernels.linear_attention.reference_backward import (
    chunked_backward_reference,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("q", "k", "v", "log_decay", "beta")
_TOLERANCE = 8e-3
# a text that is read before a step of decoding is read in such pieces
_PIECE = 4096


@dataclass(frozen=True)
class Inputs:
    """One point: q, k, v [B T H D], log_decay and beta [B T H] float32, dout; state [B H D D].

    ``passes`` is "forward", "forward+backward", or "decode": one token behind T others.
    """

    tokens: dict[str, Tensor]
    dout: Tensor
    state: Tensor | None
    passes: str

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return "backward" in self.passes


def make_inputs(
    passes: str, dtype: str, T: int, H: int, D: int, settings: Settings, B: int = 1
) -> Inputs:
    """Draw tokens whose keys have length 1, and which forget up to a tenth."""

    def draw(T: int) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=settings.device)

        vectors = [randn(B, T, H, D) for _ in range(3)]
        vectors[:2] = [F.normalize(t, dim=-1) for t in vectors[:2]]
        decay, beta = F.logsigmoid(randn(B, T, H) + 4), randn(B, T, H).sigmoid()
        return dict(zip(NAMES, (*(t.to(DTYPES[dtype]) for t in vectors), decay, beta)))

    random = settings.generator
    if passes != "decode":
        tokens = draw(T)
        dout = torch.randn(tokens["v"].shape, generator=random, device=settings.device)
        return Inputs(tokens, dout.to(DTYPES[dtype]), None, passes)
    state = torch.zeros(B, H, D, D, device=settings.device)
    for start in range(0, T, _PIECE):
        _, state = _attend(draw(min(_PIECE, T - start)), state)
    return Inputs(draw(1), state, state, passes)


def _attend(tokens: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay, beta = (tokens[name] for name in NAMES)
    out, state = linear_attention(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=state, return_state=True
    )
    return out, state


def _outputs(attend: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    if not inputs.backward:
        out, state = attend(inputs.tokens, inputs.state)
        return {"out": out} if inputs.state is None else {"out": out, "state": state}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tokens.items()}
    out, _ = attend(leaves, None)
    grads = torch.autograd.grad(out, leaves.values(), inputs.dout, allow_unused=True)
    found = {f"d{name}": grad for name, grad in zip(leaves, grads) if grad is not None}
    return {"out": out.detach(), **found}


def _checked(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is compared: of the first head."""
    return {name: t[:, 0] if name == "state" else t[:, :, 0] for name, t in results.items()}


def _work(attend: Callable[..., Any], inputs: Inputs, *, memory: bool = False) -> Work:
    call = functools.partial(_outputs, attend, inputs)
    details: dict[str, Any] = {}
    if memory:
        call()  # what is compiled and cached on the first call is no memory of a later one
        details["peak_extra_bytes"] = peak_extra_bytes(call, inputs.dout.device)
        if inputs.state is not None:
            details["state_bytes"] = inputs.state.nbytes
    moved = sum(t.nbytes for t in inputs.tokens.values()) + inputs.tokens["v"].nbytes
    moved *= 3 if inputs.backward else 1
    moved += 0 if inputs.state is None else 2 * inputs.state.nbytes
    return Work(
        call, lambda: _checked(call()), read_bytes=moved, grad=inputs.backward, details=details
    )


def _ours(inputs: Inputs) -> Work:
    return _work(_attend, inputs, memory=True)


def _transformers(inputs: Inputs) -> Work:
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import (
            torch_chunk_gated_delta_rule,
            torch_recurrent_gated_delta_rule,
        )
    except ImportError as error:
        raise PeerMissingError(f"transformers cannot be imported: {error}") from error
    rule = torch_chunk_gated_delta_rule
    if inputs.passes == "decode":
        rule = torch_recurrent_gated_delta_rule

    def attend(tokens: dict[str, Tensor], state: Tensor | None) -> Any:
        q, k, v, log_decay, beta = (tokens[name] for name in NAMES)
        return rule(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)

    return _work(attend, inputs)


def _softmax(inputs: Inputs) -> Work:
    if inputs.passes == "decode":
        raise PeerMissingError("its cache of keys is another case: `flash_attention`")

    def attend(tokens: dict[str, Tensor], _: Tensor | None) -> Any:
        return flash_attention(*(tokens[name] for name in "qkv")), None

    return _work(attend, inputs, memory=True)


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    """Take the first head in float64."""
    tokens = {name: t[:, :, :1].double() for name, t in inputs.tokens.items()}
    q, k, v, log_decay, beta = (tokens[name] for name in NAMES)
    state = None if inputs.state is None else inputs.state[:, :1].double()
    settings: dict[str, Any] = {
        "log_decay": log_decay, "beta": beta, "initial_state": state, "scale": q.shape[-1] ** -0.5
    }  # fmt: skip
    out, last = chunked_reference(q, k, v, **settings)
    results = {"out": out} if state is None else {"out": out, "state": last}
    if inputs.backward:
        dout = inputs.dout[:, :, :1].double()
        *grads, _ = chunked_backward_reference(dout, None, q, k, v, **settings)
        results |= {f"d{name}": grad for name, grad in zip(NAMES, grads)}  # type: ignore[misc]
    return {name: t[:, 0] if name == "state" else t[:, :, 0] for name, t in results.items()}


def _flops(passes: str, dtype: str, T: int, H: int, D: int, B: int = 1) -> float:
    """Count those of the recurrence: a state is read twice and written once by every token."""
    tokens = 1 if passes == "decode" else T
    return 6.0 * B * tokens * H * D * D * (3 if "backward" in passes else 1)


def _grid() -> list[Point]:
    heads = {"H": 4, "D": 128}
    grid: list[Point] = [
        {"passes": "forward+backward", "dtype": "fp32", "T": T, **heads}
        for T in (1024, 2048, 4096, 8192, 16384, 32768)
    ]
    grid += [{"passes": "forward", "dtype": dtype, "T": 32768, **heads} for dtype in DTYPES]
    grid.append({"passes": "forward+backward", "dtype": "bf16", "T": 32768, **heads})
    lengths = (2**10, 2**15, 2**20)
    return [*grid, *({"passes": "decode", "dtype": "fp32", "T": T, **heads} for T in lengths)]


def case() -> Case:
    """Return the case."""
    return Case(
        name="linear_attention",
        title="Linear attention (gated delta rule)",
        grid=_grid(),
        inputs=make_inputs,
        reference=_reference,
        providers={
            "bitnet_triton": Provider("bitnet_triton", _ours, _TOLERANCE, arithmetic="fp32"),
            "transformers": Provider(
                "hf torch forms", _transformers, _TOLERANCE, arithmetic="fp32",
                note="Qwen3-Next's, in float32",
            ),
            "softmax": Provider(
                "flash_attention", _softmax, None, note="ours, softmax over all keys"
            ),
        },
        baselines=("transformers", "softmax"),
        flops=_flops,
        panels=(("passes", "dtype"), ("T",)),
    )  # fmt: skip
