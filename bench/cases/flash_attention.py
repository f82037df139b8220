"""Attention, forward and backward, under four masks, and decoding from a cache.

At 32768 tokens only a sample of queries is checked, against float64: the full matrix would not fit.
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
from bitnet_triton.kernels import Mask, flash_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=1024),
}
_TOLERANCE = 8e-3
# a dense mask or a dense matrix of scores of more tokens than that does not fit
_MOST_DENSE = 8192
_SAMPLE = 64


@dataclass(frozen=True)
class Inputs:
    """One point: q [1 Tq H D]; k, v [1 Tk Hk D] as views of a cache [1 Hk Tk D]; dout."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Mask
    backward: bool

    @property
    def rows(self) -> Tensor:
        """The queries that are checked: all of them where the matrix of scores fits."""
        Tq, Tk = self.q.shape[1], self.k.shape[1]
        return torch.arange(0, Tq, 1 if min(Tq, Tk) <= _MOST_DENSE else Tq // _SAMPLE)


def make_inputs(
    passes: str, mask: str, dtype: str, T: int, H: int, Hk: int, D: int, settings: Settings
) -> Inputs:
    """Draw everything from normal distributions."""

    def randn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=settings.device)
        return values.to(DTYPES[dtype]).transpose(1, 2)

    random, Tq = settings.generator, 1 if passes == "decode" else T
    q, k, v, dout = randn(1, H, Tq, D), randn(1, Hk, T, D), randn(1, Hk, T, D), randn(1, H, Tq, D)
    return Inputs(q, k, v, dout, MASKS[mask], passes == "forward+backward")


def _outputs(attend: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    if not inputs.backward:
        return {"out": attend(inputs.q, inputs.k, inputs.v)}
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = attend(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def _work(attend: Callable[..., Tensor], inputs: Inputs, *, memory: bool = False) -> Work:
    def call() -> dict[str, Tensor]:
        return _outputs(attend, inputs)

    def checked() -> dict[str, Tensor]:
        return {name: t[:, inputs.rows] if name == "out" else t for name, t in call().items()}

    details: dict[str, Any] = {}
    if memory:
        call()  # what is compiled and cached on the first call is no memory of a later one
        details["peak_extra_bytes"] = peak_extra_bytes(call, inputs.q.device)
    passes = 3 if inputs.backward else 1
    moved = passes * (2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes)
    return Work(call, checked, read_bytes=moved, grad=inputs.backward, details=details)


def _ours(inputs: Inputs) -> Work:
    return _work(functools.partial(flash_attention, mask=inputs.mask), inputs, memory=True)


def _dense_mask(inputs: Inputs) -> Tensor | None:
    if inputs.mask.window is None:
        return None
    if inputs.k.shape[1] > _MOST_DENSE:
        raise PeerMissingError("a dense mask of all pairs does not fit")
    return inputs.mask.visible(inputs.q.shape[1], inputs.k.shape[1], device=inputs.q.device)


def _sdpa(inputs: Inputs) -> Work:
    dense = _dense_mask(inputs)
    # PyTorch aligns is_causal to the top left: one query would see one key
    causal = inputs.mask.causal and dense is None and inputs.q.shape[1] > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense, is_causal=causal, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return _work(attend, inputs)


def _flex(inputs: Inputs) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if inputs.backward and inputs.q.device.type == "cpu":
        raise PeerMissingError("FlexAttention has no backward on a CPU")
    Tq, Tk, mask = inputs.q.shape[1], inputs.k.shape[1], inputs.mask

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        offset = i + (Tk - Tq) - j
        seen = offset >= 0
        return seen if mask.window is None else seen & (offset < mask.window)

    # after eight shapes torch.compile gives up on a function, which then runs uncompiled
    torch._dynamo.reset()
    block_mask = None
    if mask.causal:
        # uncompiled, it would make the whole matrix
        make_mask = torch.compile(create_block_mask)
        block_mask = make_mask(visible, None, None, Tq, Tk, device=inputs.q.device)
    compiled = torch.compile(flex_attention, fullgraph=True)
    grouped = inputs.q.shape[2] != inputs.k.shape[2]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return _work(attend, inputs)


def _eager(inputs: Inputs) -> Work:
    try:
        from transformers.models.llama.modeling_llama import eager_attention_forward
    except ImportError as error:
        raise PeerMissingError(f"transformers cannot be imported: {error}") from error
    if inputs.q.shape[1] > _MOST_DENSE:
        raise PeerMissingError("a dense matrix of scores does not fit")
    Tq, Tk, D = inputs.q.shape[1], inputs.k.shape[1], inputs.q.shape[-1]
    seen = inputs.mask.visible(Tq, Tk, device=inputs.q.device)
    bias = torch.zeros(seen.shape, dtype=inputs.q.dtype).masked_fill(~seen, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = inputs.q.shape[2] // inputs.k.shape[2]  # type: ignore[assignment]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return eager_attention_forward(module, q, k, v, bias, scaling=D**-0.5)[0]

    return _work(attend, inputs)


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    """Attend in float64, a head at a time."""
    Tq, Tk = inputs.q.shape[1], inputs.k.shape[1]
    groups = inputs.q.shape[2] // inputs.k.shape[2]
    rows = inputs.rows
    p = rows[:, None] + (Tk - Tq)
    offset = p - torch.arange(Tk)
    hidden = (offset < 0) if inputs.mask.causal else torch.zeros_like(offset, dtype=torch.bool)
    if inputs.mask.window is not None:
        hidden = hidden | (offset >= inputs.mask.window)
    q, k, v = inputs.q[:, rows], inputs.k, inputs.v
    parts: dict[str, list[Tensor]] = {"out": [], "dq": [], "dk": [], "dv": []}
    for head in range(q.shape[2]):
        leaves = [
            t[0, :, h].double().requires_grad_(inputs.backward)
            for t, h in ((q, head), (k, head // groups), (v, head // groups))
        ]
        with torch.set_grad_enabled(inputs.backward):
            scores = leaves[0] @ leaves[1].t() * q.shape[-1] ** -0.5
            out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ leaves[2]
        parts["out"].append(out.detach())
        if inputs.backward:
            grads = torch.autograd.grad(out, leaves, inputs.dout[0, :, head].double())
            for name, grad in zip(("dq", "dk", "dv"), grads):
                parts[name].append(grad)
    stacked = {name: torch.stack(t, 1)[None] for name, t in parts.items() if t}
    for name in ("dk", "dv"):
        if name in stacked:  # query heads of a group share a key head
            stacked[name] = stacked[name].unflatten(2, (-1, groups)).sum(3)
    return stacked


def _flops(passes: str, mask: str, dtype: str, T: int, H: int, Hk: int, D: int) -> float:
    Tq = 1 if passes == "decode" else T
    pairs = float(Tq * T) if mask == "full" or Tq == 1 else T * (T + 1) / 2
    if mask == "window":
        window = min(MASKS["window"].window or T, T)
        pairs = window * (window + 1) / 2 + (T - window) * window if Tq > 1 else window
    return 4 * pairs * D * H * (3.5 if passes == "forward+backward" else 1)


def _grid() -> list[Point]:
    heads = {"H": 8, "Hk": 8, "D": 64}
    grid: list[Point] = []
    for dtype in DTYPES:
        for passes in ("forward", "forward+backward"):
            long = {"passes": passes, "dtype": dtype, "T": 4096}
            grid += [{**long, "mask": mask, **heads} for mask in MASKS]
            grid.append({**long, "mask": "causal", **heads, "D": 128})
            grid.append({**long, "mask": "causal", **heads, "Hk": 2})
    longest = {"passes": "forward", "dtype": "bf16", "T": 32768, **heads}
    grid += [{**longest, "mask": mask} for mask in ("causal", "window")]
    # the attention of the published 2B model
    step = {"passes": "decode", "mask": "causal", "dtype": "bf16", "H": 20, "Hk": 5, "D": 128}
    return [*grid, *({**step, "T": T} for T in (4096, 32768))]


def case() -> Case:
    """Return the case."""
    return Case(
        name="flash_attention",
        title="Attention",
        grid=_grid(),
        inputs=make_inputs,
        reference=_reference,
        providers={
            "bitnet_triton": Provider("bitnet_triton", _ours, _TOLERANCE),
            "sdpa": Provider(
                "torch SDPA", _sdpa, _TOLERANCE, note="a window is a dense mask there"
            ),
            "flex": Provider("torch FlexAttention", _flex, _TOLERANCE, note="torch.compile"),
            "transformers": Provider("hf eager", _eager, _TOLERANCE, note="dense scores"),
        },
        baselines=("sdpa", "flex"),
        flops=_flops,
        panels=(("passes", "mask"), ("dtype", "T")),
    )
