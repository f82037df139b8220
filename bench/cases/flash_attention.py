"""Attention, forward and backward, under four masks, and decoding from a cache.

Of long sequences only a part is checked, against float64: the full matrix would not fit. That is a
sample of queries, or with gradients, which need all of them, the first and the last head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import Case, PeerMissingError, Point, Provider, Settings, Work
from bench.machine import copies_beyond_cache
from bench.memory import peak_extra_bytes
from bench.recorded import in_turn
from bitnet_triton.kernels import Mask, flash_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=1024),
    "window_40": Mask(window=40),  # for tests
    "window_4096": Mask(window=4096),
}
_TOLERANCE = 8e-3
# a dense mask or a dense matrix of scores of more tokens than that does not fit
_MOST_DENSE = 8192
_SAMPLE = 64


@dataclass(frozen=True)
class Inputs:
    """One point: q [B Tq H D]; k, v [B Tk Hk D] as views of a cache [B Hk Tk D]; dout.

    ``passes`` is "forward", "forward+backward", "backward" alone, or "decode".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Mask
    passes: str

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return "backward" in self.passes

    @property
    def groups(self) -> int:
        """Query heads for each head of the keys."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def rows(self) -> Tensor:
        """The queries that are checked: all of them where the matrix of scores fits."""
        Tq, Tk = self.q.shape[1], self.k.shape[1]
        step = 1 if self.backward or min(Tq, Tk) <= _MOST_DENSE else Tq // _SAMPLE
        return torch.arange(0, Tq, step, device=self.q.device)

    @property
    def heads(self) -> list[int]:
        """The heads of the keys that are checked."""
        Hk = self.k.shape[2]
        few = self.backward and self.q.shape[1] > _MOST_DENSE
        return sorted({0, Hk - 1}) if few else list(range(Hk))

    def checked(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is compared: of the first sequence."""
        Hk, picked = self.k.shape[2], {}
        for name, t in results.items():
            rows = t[0, self.rows] if name == "out" else t[0]
            picked[name] = rows.unflatten(1, (Hk, -1))[:, self.heads].flatten(1, 2)
        return picked


def make_inputs(
    passes: str, mask: str, dtype: str, T: int, H: int, Hk: int, D: int, settings: Settings,
    B: int = 1,
) -> Inputs:  # fmt: skip
    """Draw everything from normal distributions."""

    def randn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=settings.device)
        return values.to(DTYPES[dtype]).transpose(1, 2)

    random, Tq = settings.generator, 1 if passes == "decode" else T
    q, k, v, dout = randn(B, H, Tq, D), randn(B, Hk, T, D), randn(B, Hk, T, D), randn(B, H, Tq, D)
    return Inputs(q, k, v, dout, MASKS[mask], passes)


def _outputs(attend: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    if not inputs.backward:
        return {"out": attend(inputs.q, inputs.k, inputs.v)}
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = attend(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def _backward_alone(attend: Callable[..., Tensor], inputs: Inputs) -> Callable[[], dict]:
    """Return what computes gradients again and again from what one forward has kept."""
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    with torch.enable_grad():
        out = attend(*leaves)

    def backward() -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
        return dict(zip(("dq", "dk", "dv"), grads))

    return backward


def _work(attend: Callable[..., Tensor], inputs: Inputs, *, memory: bool = False) -> Work:
    alone = inputs.passes == "backward"
    call = _backward_alone(attend, inputs) if alone else functools.partial(_outputs, attend, inputs)
    details: dict[str, Any] = {}
    if memory:
        call()  # what is compiled and cached on the first call is no memory of a later one
        details["peak_extra_bytes"] = peak_extra_bytes(call, inputs.q.device)
    passes = 3 if inputs.backward else 1
    moved = passes * (2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes)
    work = Work(
        call, lambda: inputs.checked(call()), read_bytes=moved, grad=inputs.backward,
        details=details,
    )  # fmt: skip
    if inputs.passes == "decode" and inputs.q.device.type == "cuda":
        return _decode_on_gpu(attend, inputs, work)
    return work


def _decode_on_gpu(attend: Callable[..., Tensor], inputs: Inputs, work: Work) -> Work:
    """Let each step read a cache of its own: a graph of them, none of which finds it on the GPU."""
    copies = copies_beyond_cache(inputs.k.nbytes + inputs.v.nbytes, inputs.q.device)
    caches = [(inputs.k, inputs.v)]
    caches += [(inputs.k.clone(), inputs.v.clone()) for _ in range(copies - 1)]
    calls = [lambda k=k, v=v: attend(inputs.q, k, v) for k, v in caches]
    return in_turn(calls, inputs.q.device, work)


def _ours(inputs: Inputs) -> Work:
    return _work(functools.partial(flash_attention, mask=inputs.mask), inputs, memory=True)


def _dense_mask(inputs: Inputs) -> Tensor | None:
    if inputs.mask.window is None:
        return None
    if inputs.k.shape[1] > _MOST_DENSE:
        raise PeerMissingError("a dense mask of all pairs does not fit")
    return inputs.mask.visible(inputs.q.shape[1], inputs.k.shape[1], device=inputs.q.device)


def _sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Work:
    """Take the backend that PyTorch chooses, or one by name, which has no dense masks."""
    if backend == SDPBackend.CUDNN_ATTENTION and inputs.q.device.type != "cuda":
        raise PeerMissingError("cuDNN runs on NVIDIA GPUs")
    if backend is not None and inputs.mask.window is not None:
        raise PeerMissingError("SDPA has no window without a dense mask")
    dense = _dense_mask(inputs)
    # PyTorch aligns is_causal to the top left: one query would see one key
    causal = inputs.mask.causal and dense is None and inputs.q.shape[1] > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=dense, is_causal=causal, enable_gqa=grouped
            )
        return out.transpose(1, 2)

    return _work(attend, inputs)


def _flex(inputs: Inputs) -> Work:
    from torch._functorch import config as functorch_config
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
    grouped = inputs.groups > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    # a backward alone runs again and again on what one forward has kept
    with functorch_config.patch(donated_buffer=inputs.passes != "backward"):
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
    bias = torch.zeros_like(seen, dtype=inputs.q.dtype).masked_fill(~seen, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = inputs.groups  # type: ignore[assignment]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return eager_attention_forward(module, q, k, v, bias, scaling=D**-0.5)[0]

    return _work(attend, inputs)


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    """Attend in float64, a head at a time."""
    Tq, Tk, groups = inputs.q.shape[1], inputs.k.shape[1], inputs.groups
    rows = inputs.rows
    offset = rows[:, None] + (Tk - Tq) - torch.arange(Tk, device=rows.device)
    hidden = (offset < 0) if inputs.mask.causal else torch.zeros_like(offset, dtype=torch.bool)
    if inputs.mask.window is not None:
        hidden = hidden | (offset >= inputs.mask.window)
    del offset
    q, k, v = inputs.q[0, rows], inputs.k[0], inputs.v[0]
    parts: dict[str, list[Tensor]] = {"out": [], "dq": [], "dk": [], "dv": []}
    for head in (kv * groups + i for kv in inputs.heads for i in range(groups)):
        leaves = [
            t[:, h].double().requires_grad_(inputs.backward)
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
    if inputs.passes == "backward":
        del parts["out"]
    stacked = {name: torch.stack(t, 1) for name, t in parts.items() if t}
    for name in ("dk", "dv"):
        if name in stacked:  # query heads of a group share a key head
            stacked[name] = stacked[name].unflatten(1, (-1, groups)).sum(2)
    return stacked


def _flops(
    passes: str, mask: str, dtype: str, T: int, H: int, Hk: int, D: int, B: int = 1
) -> float:
    Tq, window = 1 if passes == "decode" else T, MASKS[mask].window
    pairs = float(Tq * T) if mask == "full" or Tq == 1 else T * (T + 1) / 2
    if window is not None:
        window = min(window, T)
        pairs = window * (window + 1) / 2 + (T - window) * window if Tq > 1 else window
    return 4 * pairs * D * H * B * {"forward+backward": 3.5, "backward": 2.5}.get(passes, 1)


def _grid() -> list[Point]:
    heads = {"H": 8, "Hk": 8, "D": 64}
    grid: list[Point] = []
    for dtype in DTYPES:
        for passes in ("forward", "forward+backward"):
            long = {"passes": passes, "dtype": dtype, "T": 4096}
            grid += [{**long, "mask": mask, **heads} for mask in ("causal", "full", "window")]
            grid.append({**long, "mask": "causal", **heads, "D": 128})
            grid.append({**long, "mask": "causal", **heads, "Hk": 2})
    longest = {"passes": "forward", "dtype": "bf16", "T": 32768, **heads}
    grid += [{**longest, "mask": mask} for mask in ("causal", "window")]
    # the attention of the published 2B model
    step = {"passes": "decode", "mask": "causal", "dtype": "bf16", "H": 20, "Hk": 5, "D": 128}
    return [*grid, *({**step, "T": T} for T in (4096, 32768))]


def case() -> Case:
    """Return the case."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
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
            **{
                f"sdpa_{name}": Provider(
                    f"SDPA {name}",
                    functools.partial(_sdpa, backend=backend),
                    _TOLERANCE,
                    default=False,
                )
                for name, backend in backends.items()
            },
        },
        baselines=("sdpa", "sdpa_flash", "sdpa_cudnn", "flex"),
        flops=_flops,
        panels=(("passes", "mask"), ("dtype", "T")),
    )
