"""Checks of attention under every mask, packed, padded, capped, decoding; and of the rotation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.suite.checks import DTYPES, Checks, assert_all_close, assert_same, gradients
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import Mask, apply_rotary, flash_attention, rotary_and_store
from bitnet_triton.kernels.flash_attention.reference import (
    attention_backward_reference,
    attention_reference,
)
from bitnet_triton.kernels.rotary.reference import rotary_reference, store_reference, token_rows
from bitnet_triton.testing import assert_close

_MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=70),
    "window to both sides": Mask(causal=False, window=70, window_right=9),
    "sinks": Mask(window=30, sinks=5),
    "dilation": Mask(window=9, dilation=3),
    "dilation by head": Mask(window=9, dilation=(1, 3, 2, 4), sinks=2),
    "global": Mask(window=9, global_tokens=(0, 40)),
    "dense from": Mask(window=20, dense_from=100),
    "local": Mask(pattern="local", block=37),
    "strided": Mask(pattern="strided", block=12),
    "fixed": Mask(pattern="fixed", block=37, summary=3, sinks=2),
}
_MAIN = ("causal", "full", "window")


def _int32(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _draw(
    B: int, Tq: int, Tk: int, heads: tuple[int, int], D: int, device: torch.device
) -> list[Tensor]:
    """Return q, k, v, dout, dlse; k and v as a cache of transformers holds them."""
    H, Hk = heads
    q, dout = (torch.randn(B, Tq, H, D, device=device) for _ in range(2))
    k, v = (torch.randn(B, Hk, Tk, D, device=device).transpose(1, 2) for _ in range(2))
    return [q, k, v, dout, torch.randn(B, H, Tq, device=device)]


def _passes(attend: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[dict, Tensor]:
    """Return results and gradients, and which queries see a key: the others have no lse."""
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs[:3])
    out, lse = attend(q, k, v)
    seen = torch.isfinite(lse)
    dlse = inputs[4].to(lse.dtype).masked_fill(~seen, 0.0)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (inputs[3], dlse))
    results = {"out": out, "lse": lse.masked_fill(~seen, 0.0), "dq": dq, "dk": dk, "dv": dv}
    return {name: t.detach() for name, t in results.items()}, seen


def _steps(settings: dict[str, Any], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what the algorithm of the paper gives in the dtype of the inputs, without kernels."""
    q, k, v, dout, dlse = inputs
    out, lse = attention_reference(q, k, v, **settings)
    seen = torch.isfinite(lse)
    dlse = dlse.to(lse.dtype).masked_fill(~seen, 0.0)
    dq, dk, dv = attention_backward_reference(dout, dlse, q, k, v, (out, lse), **settings)
    return {"out": out, "lse": lse.masked_fill(~seen, 0.0), "dq": dq, "dk": dk, "dv": dv}


def _check_attention(
    mask: Mask, T: int, D: int, dtype: torch.dtype, device: torch.device, **call: Any
) -> None:
    lengths = {name: _int32(device, *v) for name, v in call.pop("lengths", {}).items()}
    drawn = _draw(2, call.pop("Tq", T), T, call.pop("heads", (4, 2)), D, device)
    inputs = [t.to(dtype) for t in drawn]
    settings = {"mask": mask, "scale": D**-0.5, **lengths, **call}
    ours, seen = _passes(functools.partial(flash_attention, return_lse=True, **settings), inputs)
    wide = [t.double() for t in inputs]
    exact, wanted = _passes(functools.partial(attention_reference, **settings), wide)
    assert_same("queries that see a key", seen, wanted)
    assert_all_close(ours, exact, _steps(settings, inputs), gradients_are_sums=True)


def _check_packed(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare each packed sequence with the reference of it alone: none may see another."""
    ends = (0, 130, 135, 135, 302)
    cu = _int32(device, *ends)
    q, k, v, dout, _ = (t[0].to(dtype) for t in _draw(1, ends[-1], ends[-1], (4, 2), D, device))
    mask = Mask(window=50, sinks=3)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split([b - a for a, b in itertools.pairwise(ends)]) for t in (q, k, v)))
        settings = {"mask": mask, "scale": D**-0.5}
        return torch.cat(
            [attention_reference(*(t[None] for t in p), **settings)[0][0] for p in parts]
        )

    wide = [t.double() for t in (q, k, v)]
    assert_all_close(
        gradients(packed, (q, k, v), dout),
        gradients(alone, wide, dout.double()),
        gradients(alone, (q, k, v), dout),
        gradients_are_sums=True,
    )


def _check_decode(
    mask: Mask, T: int, Tq: int, dtype: torch.dtype, device: torch.device, **call: Any
) -> None:
    lengths = {name: _int32(device, *v) for name, v in call.pop("lengths", {}).items()}
    D = 128
    q, k, v = (t.to(dtype) for t in _draw(2, Tq, T, (20, 5), D, device)[:3])
    if lengths:  # what stands where no valid key is may be anything
        for row, (left, used) in enumerate(zip(lengths["leftpad_k"], lengths["seqused_k"])):
            for t in (k, v):
                t[row, :left] = t[row, used:] = float("nan")
    settings = {"mask": mask, "scale": D**-0.5, **lengths, **call}
    with torch.no_grad():
        out, lse = flash_attention(q, k, v, return_lse=True, **settings)
        exact, exact_lse = attention_reference(*(t.double() for t in (q, k, v)), **settings)
        eager, _ = attention_reference(q, k, v, **settings)
    seen = torch.isfinite(exact_lse)
    assert_same("queries that see a key", torch.isfinite(lse), seen)
    # averages of many values, added share by share where the reference adds pairwise
    worst = {"worst": 1e-6} if dtype == torch.float32 else {}
    assert_close("out", out, exact, eager=eager, **worst)
    assert_close("lse", lse[seen], exact_lse[seen])


def _angles(*shape: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return cosines and sines whose halves differ: nothing may read one for the other."""
    angle = 6.3 * torch.rand(shape, device=device)
    return [angle.cos().to(dtype), angle.sin().to(dtype)]


def _check_rotary(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    B, T, _, D = shape
    x, dy = (torch.randn(*shape, device=device).to(dtype) for _ in range(2))
    cos, sin = _angles(B, T, D, dtype=dtype, device=device)
    wide = [t.double() for t in (cos, sin)]
    assert_all_close(
        gradients(lambda x: apply_rotary(x, cos, sin), (x,), dy),
        gradients(lambda x: rotary_reference(x, *wide), (x.double(),), dy.double()),
        gradients(lambda x: rotary_reference(x, cos, sin), (x,), dy),
    )


def _check_store(T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    B, H, Hk, C = 3, 20, 5, 24
    qkv = torch.randn(B, T, H + 2 * Hk, D, device=device).to(dtype)
    table = _angles(64, D, dtype=dtype, device=device)
    caches = [torch.randn(B, Hk, C, D, device=device).to(dtype).transpose(1, 2) for _ in "kv"]
    # apart, from padding on, and partly outside of the cache
    slots, positions = _int32(device, 3, -1, C - 1), _int32(device, 20, -1, 9)
    q, k, v = qkv.split([H, Hk, Hk], dim=2)

    def stored(to: torch.dtype) -> list[Tensor]:
        rows = [token_rows(t.to(to), positions, T) for t in table]
        k_cache, v_cache = (cache.to(to, copy=True) for cache in caches)
        store_reference(k_cache, rotary_reference(k.to(to), *rows), slots)
        store_reference(v_cache, v.to(to), slots)
        return [rotary_reference(q.to(to), *rows), k_cache, v_cache]

    exact, eager = stored(torch.float64), stored(dtype)
    rotated = rotary_and_store(qkv, *table, *caches, slots, positions=positions)
    for name, ours, wide, narrow in zip(("q", "k", "v"), (rotated, *caches), exact, eager):
        assert_close(name, ours, wide, eager=narrow)
    assert_same("v", caches[1], eager[2])


def _add_decode(checks: Checks) -> None:
    T = 600 if checks.small else 4099
    lengths = {"leftpad_k": (3, T // 2), "seqused_k": (T - 7, T // 2 + 1)}
    kinds: dict[str, tuple[Mask, dict[str, Any]]] = {
        "one query": (Mask(), {"Tq": 1}),
        "one query padded": (Mask(), {"Tq": 1, "lengths": lengths}),
        "four queries window sinks padded": (
            Mask(window=T // 3, sinks=4), {"Tq": 4, "lengths": lengths},
        ),
        "one query softcap": (Mask(), {"Tq": 1, "softcap": 2.0}),
    }  # fmt: skip
    for kind, (mask, call) in kinds.items():
        for name, dtype in DTYPES.items():
            run = functools.partial(
                _check_decode, mask, T, dtype=dtype, device=checks.device, **call
            )
            essential = name == "bf16" and kind.startswith("one query")
            checks.add("flash_attention", f"decode {kind} {name}", run, essential=essential)


def _add_rotary(checks: Checks) -> None:
    shapes = (
        [(2, 3, 5, 6), (1, 7, 20, 128)] if checks.small else [(2, 513, 20, 128), (3, 1, 33, 100)]
    )
    for i, shape in enumerate(shapes):
        for name, dtype in DTYPES.items():
            run = functools.partial(_check_rotary, shape, dtype, checks.device)
            what = f"{list(shape)} {name} forward and backward"
            checks.add("apply_rotary", what, run, essential=i == 0 and name == "bf16")
    for T in (1, 2):
        for name, dtype in DTYPES.items():
            run = functools.partial(_check_store, T, 128, dtype, checks.device)
            what = f"{T} tokens a row {name}"
            checks.add("rotary_and_store", what, run, essential=T == 1 and name == "bf16")


def items(plan: Plan) -> Sequence[Item]:
    """Return the checks; masks and paddings in bfloat16, the main masks in every dtype."""
    checks = Checks(plan)
    T = 150 if plan.small else 515
    both = "forward and backward"

    def add(
        what: str, mask: Mask, dtype: str, D: int = 64, *, essential: bool = True, **call: Any
    ) -> None:
        run = functools.partial(_check_attention, mask, T, D, DTYPES[dtype], plan.device, **call)
        name = f"{what} D={D} {dtype} {both}"
        checks.add("flash_attention", name, run, essential=essential)

    for dtype in DTYPES:
        for D in (64, 128):
            for kind in _MAIN:
                essential = dtype == "bf16" and (D == 128 or kind == "causal")
                add(kind, _MASKS[kind], dtype, D, essential=essential)
        run = functools.partial(_check_packed, 64, DTYPES[dtype], plan.device)
        what = f"packed sequences D=64 {dtype} {both}"
        checks.add("flash_attention", what, run, essential=dtype == "bf16")
    for kind, mask in _MASKS.items():
        if kind not in _MAIN:
            add(kind, mask, "bf16", essential=kind in ("sinks", "dilation", "global"))
    padding = {"leftpad_k": (0, T - 30), "seqused_k": (T - 40, T)}
    add("padding", Mask(window=40, sinks=2), "bf16", lengths=padding)
    unused = {"seqused_q": (0, T // 2), "seqused_k": (7, T)}
    add("unused queries", Mask(), "bf16", lengths=unused, essential=False)
    add("softcap", Mask(window=40), "bf16", softcap=1.5)
    add("more keys than queries", Mask(), "bf16", Tq=40, essential=False)
    add("five heads a key", Mask(), "bf16", 128, heads=(20, 4), essential=False)
    add("large heads", Mask(window=70), "bf16", 256, heads=(2, 1), essential=False)
    _add_decode(checks)
    _add_rotary(checks)
    return checks.essential_first()
