"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.paged_call import PagedCall
from bitnet_triton.kernels.flash_attention.reference import (
    Select,
    attention_backward_reference,
    attention_reference,
)
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.device import smallest_dot

# a program holds whole heads of a tile of rows
LARGEST_HEAD = 256
# between two rows: 256 of them, the most that a tile has, overflow 32 bits from here on
_LARGEST_STRIDE = 2**23

Gradients = tuple[Tensor, Tensor, Tensor]
AnyCall = TypeVar("AnyCall", Call, PagedCall)


@functools.cache
def _triton_modules() -> tuple[ModuleType, ModuleType]:
    """Import Triton on first use: that takes longer than this package, and asking again costs."""
    from bitnet_triton.kernels.flash_attention import decode, launch

    return decode, launch


def _triton_fwd(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    decode, launch = _triton_modules()
    q, k, v = inner_contiguous(q, k, v)
    q, call = positive_scale(q, call)
    if call.decodes and decode.decode_objection(q, k, call.mask) is None:
        return decode.launch_decode(
            q, k, v, mask=call.mask, scale=call.scale, softcap=call.softcap,
            leftpad_k=call.leftpad_k, seqused_k=call.seqused_k,
        )  # fmt: skip
    return launch.launch_forward(q, k, v, call)


def positive_scale(q: Tensor, call: AnyCall) -> tuple[Tensor, AnyCall]:
    """Return the same attention with a positive factor: the softmax scales what it subtracted."""
    if call.softcap is not None or call.scale > 0:
        return q, call
    return -q, replace(call, scale=-call.scale or torch.finfo(torch.float32).tiny)


def _triton_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: Call,
) -> Gradients:  # fmt: skip
    _, launch = _triton_modules()
    dlse = None if dlse is None else dlse.contiguous()
    q, k, v = inner_contiguous(q, k, v)
    out, lse = out.contiguous(), lse.contiguous()
    return launch.launch_backward(dout.contiguous(), dlse, q, k, v, out, lse, call)


def inner_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors that kernels can read, copied where they could not."""
    return tuple([t if _fits_a_tile(t) else t.contiguous() for t in tensors])


def _fits_a_tile(t: Tensor) -> bool:
    # offsets within a tile are of 32 bits
    return t.stride(-1) == 1 and t.stride(-3) < _LARGEST_STRIDE


def triton_objection(q: Tensor, v: Tensor, call: AnyCall) -> str | None:
    """Say why no kernel computes this; None when one does."""
    widest, largest = max(q.shape[-1], v.shape[-1]), LARGEST_HEAD
    if q.dtype == torch.float32 and smallest_dot(q.device) > 1:
        # products of float32 run in registers there, and larger heads do not fit into them
        largest //= 2
    return None if widest <= largest else f"heads have at most {largest} values"


def sequences_of(call: Call) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Yield the queries, the keys and the settings of each packed sequence."""
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        settings = settings_of(call) | {"mask": call.mask.of_row(b, k0, k1)}
        for name in ("seqused_q", "seqused_k"):
            used = getattr(call, name)
            settings[name] = None if used is None else used[b : b + 1]
        yield slice(q0, q1), slice(k0, k1), settings


def settings_of(call: Call) -> dict[str, Any]:
    """Return what the references take of a call that is not packed."""
    names = ("mask", "scale", "softcap", "leftpad_k", "seqused_q", "seqused_k")
    return {name: getattr(call, name) for name in names}


def reference_fwd(
    q: Tensor, k: Tensor, v: Tensor, call: Call, select: Select | None = None
) -> tuple[Tensor, Tensor]:
    """Attend by the formula, sequence by sequence where they are packed."""
    wide = (q.float(), k.float(), v.float())
    if call.cu_seqlens_q is None:
        out, lse = attention_reference(*wide, **settings_of(call), select=select)
        return out.to(q.dtype), lse
    T, H = q.shape[:2]
    out, lse = q.new_zeros(T, H, v.shape[-1]), q.new_zeros(H, T, dtype=torch.float32)
    for i, j, settings in sequences_of(call):
        parts = (wide[0][None, i], wide[1][None, j], wide[2][None, j])
        part, part_lse = attention_reference(*parts, **settings, select=select)
        out[i], lse[:, i] = part[0].to(q.dtype), part_lse[0]
    return out, lse


def reference_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: Call, select: Select | None = None,
) -> Gradients:  # fmt: skip
    """Return the gradients by the formula."""
    wide = (q.float(), k.float(), v.float())
    if call.cu_seqlens_q is None:
        results = (out.float(), lse)
        dq, dk, dv = attention_backward_reference(
            dout.float(), dlse, *wide, results, **settings_of(call), select=select
        )
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, j, settings in sequences_of(call):
        parts = (wide[0][None, i], wide[1][None, j], wide[2][None, j])
        part_dlse = None if dlse is None else dlse[None, :, i]
        results = (out.float()[None, i], lse[None, :, i])
        grads = attention_backward_reference(
            dout.float()[None, i], part_dlse, *parts, results, **settings, select=select
        )
        dq[i], dk[j], dv[j] = (grad[0].to(q.dtype) for grad in grads)
    return dq, dk, dv


ATTENTION_FWD = {
    "triton": Implementation(_triton_fwd, triton_objection),
    "reference": Implementation(reference_fwd),
}
ATTENTION_BWD = {
    "triton": Implementation(_triton_bwd, triton_objection),
    "reference": Implementation(reference_bwd),
}
