"""Attention forward and backward in TFLOP/s, and decoding from a long cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import Case, Outputs, PeerMissingError, Point, Provider, Settings, Work
from bench.suite import speed
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import Mask, flash_attention

_TOLERANCE = 8e-3
_WINDOW = 4096
_SMALL_WINDOW = 40
# FlexAttention compiles for half a minute a point: for the heads that the targets are about only
_FLEX_D = 128
# float64 scores of more heads than that take too long
_CHECKED_HEADS = 2

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """One point: q and dout [B H T D], k and v [B Hk T D], the mask, the pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Mask
    backward: bool

    @property
    def kv_heads(self) -> list[int]:
        """The heads of the keys that are compared with the reference."""
        Hk = self.k.shape[1]
        return sorted({0, Hk - 1}) if Hk > _CHECKED_HEADS else list(range(Hk))

    @property
    def groups(self) -> int:
        """Query heads for each head of the keys."""
        return self.q.shape[1] // self.k.shape[1]

    def checked(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is compared: the first row of the batch, some heads."""
        picked = {}
        for name, t in results.items():
            per_key = t[0].unflatten(0, (self.k.shape[1], -1))
            picked[name] = per_key[self.kv_heads].flatten(0, 1).float()
        return picked


def _inputs(
    passes: str, mask: str, B: int, T: int, H: int, Hk: int, D: int, settings: Settings
) -> Inputs:
    random = settings.generator

    def randn(heads: int) -> Tensor:
        values = torch.randn((B, heads, T, D), generator=random, device=settings.device)
        return values.to(settings.dtype)

    window = _window(settings.device)
    masks = {"causal": Mask(), "full": Mask(causal=False), "window": Mask(window=window)}
    return Inputs(randn(H), randn(Hk), randn(Hk), randn(H), masks[mask], passes == "backward")


def _window(device: torch.device) -> int:
    return _SMALL_WINDOW if device.type == "cpu" else _WINDOW


def _work(attend: Attend, inputs: Inputs) -> Work:
    """Return the pass: of a backward only the backward is timed, as everybody counts it."""
    passes = 3 if inputs.backward else 1
    moved = passes * (2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes)
    if not inputs.backward:

        def forward() -> Tensor:
            return attend(inputs.q, inputs.k, inputs.v)

        return Work(forward, lambda: inputs.checked({"out": forward()}), read_bytes=moved)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    with torch.enable_grad():
        out = attend(*leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

    def output() -> Outputs:
        return inputs.checked(dict(zip(("dq", "dk", "dv"), backward())))

    return Work(backward, output, read_bytes=moved, grad=True)


def _ours(inputs: Inputs) -> Work:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attention(q, k, v, mask=inputs.mask).transpose(1, 2)

    return _work(attend, inputs)


def _sdpa(backend: SDPBackend, inputs: Inputs) -> Work:
    device = inputs.q.device.type
    if backend == SDPBackend.CUDNN_ATTENTION and device != "cuda":
        raise PeerMissingError("cuDNN runs on NVIDIA GPUs")
    if inputs.mask.window is not None:
        raise PeerMissingError("SDPA has no window without a dense mask")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=inputs.mask.causal, enable_gqa=inputs.groups > 1
            )

    return _work(attend, inputs)


def _flex(inputs: Inputs) -> Work:
    from torch._functorch import config as functorch_config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if inputs.q.device.type == "cpu":
        raise PeerMissingError("takes longer to compile than a run on a CPU is worth")
    if inputs.q.shape[-1] != _FLEX_D:
        raise PeerMissingError(f"compiled for heads of {_FLEX_D} only: it takes half a minute each")
    mask, T = inputs.mask, inputs.q.shape[2]

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        return seen if mask.window is None else seen & (i - j < mask.window)

    blocks = create_block_mask(visible, None, None, T, T, inputs.q.device) if mask.causal else None
    compiled = torch.compile(flex_attention)
    grouped = inputs.groups > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)

    # the backward runs again and again on what one forward has kept
    with functorch_config.patch(donated_buffer=False):
        return _work(attend, inputs)


def _reference(inputs: Inputs) -> dict[str, Tensor]:
    """Attend in float64, a head at a time: the scores of one take gigabytes."""
    T, D, groups = inputs.q.shape[2], inputs.q.shape[3], inputs.groups
    offset = torch.arange(T, device=inputs.q.device)
    offset = offset[:, None] - offset
    hidden = (offset < 0) if inputs.mask.causal else torch.zeros_like(offset, dtype=torch.bool)
    if inputs.mask.window is not None:
        hidden = hidden | (offset >= inputs.mask.window)
    del offset
    parts: dict[str, list[Tensor]] = {"out": [], "dq": [], "dk": [], "dv": []}
    for kv_head in inputs.kv_heads:
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            heads = ((inputs.q, head), (inputs.k, kv_head), (inputs.v, kv_head))
            leaves = [t[0, h].double().requires_grad_(inputs.backward) for t, h in heads]
            with torch.set_grad_enabled(inputs.backward):
                scores = (leaves[0] @ leaves[1].t() * D**-0.5).masked_fill(hidden, float("-inf"))
                out = scores.softmax(-1) @ leaves[2]
            parts["out"].append(out.detach())
            if inputs.backward:
                grads = torch.autograd.grad(out, leaves, inputs.dout[0, head].double())
                for name, grad in zip(("dq", "dk", "dv"), grads):
                    parts[name].append(grad)
    stacked = {name: torch.stack(t) for name, t in parts.items() if t}
    if not inputs.backward:
        return stacked
    del stacked["out"]
    for name in ("dk", "dv"):  # query heads of a group share a key head
        stacked[name] = stacked[name].unflatten(0, (-1, groups)).sum(1)
    return stacked


def _flops(
    device: torch.device, passes: str, mask: str, B: int, T: int, H: int, Hk: int, D: int
) -> float:
    window = min(_window(device), T)
    pairs = {
        "full": float(T * T),
        "causal": T * T / 2,
        "window": window * window / 2 + (T - window) * window,
    }[mask]
    return 4 * pairs * D * H * B * (2.5 if passes == "backward" else 1)


def _case(grid: Sequence[Point], plan: Plan) -> Case:
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return Case(
        name="attention",
        title="Attention",
        grid=grid,
        inputs=_inputs,
        reference=_reference,
        providers={
            speed.OURS: Provider("bitnet_triton", _ours, _TOLERANCE),
            "sdpa_flash": Provider("SDPA flash", functools.partial(_sdpa, flash), _TOLERANCE),
            "sdpa_cudnn": Provider("SDPA cuDNN", functools.partial(_sdpa, cudnn), _TOLERANCE),
            "flex": speed.not_when_quick(
                Provider("FlexAttention", _flex, _TOLERANCE, note="torch.compile"), plan
            ),
        },
        baselines=("sdpa_flash", "sdpa_cudnn", "flex"),
        flops=functools.partial(_flops, plan.device),
    )


def _points(passes: str, plan: Plan) -> list[Point]:
    if plan.small:
        heads = {"B": 1, "T": 130, "H": 4, "Hk": 2, "D": 32}
        return [{"passes": passes, "mask": mask, **heads} for mask in ("causal", "window")]
    long = {"B": 1, "T": 16384, "H": 16, "Hk": 16}
    masks = [("causal", 128), ("window", 128), ("causal", 64), ("window", 64), ("full", 128)]
    points: list[Point] = [{"passes": passes, "mask": m, **long, "D": D} for m, D in masks]
    points.append(
        {"passes": passes, "mask": "causal", "B": 4, "T": 4096, "H": 20, "Hk": 5, "D": 128}
    )
    return points


def attention(passes: str, plan: Plan) -> Sequence[Item]:
    """Return the points of a pass, "forward" or "backward"."""
    points = _points(passes, plan)
    return speed.items(_case(points, plan), plan, quick=points[:2])
