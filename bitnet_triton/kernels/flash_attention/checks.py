"""Checks of the arguments of attention, and the ``Call`` that they make."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.quantize.op import FLOATS


def checked_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, leftpad_k: Tensor | None,
    seqused_q: Tensor | None, seqused_k: Tensor | None,
) -> Call:  # fmt: skip
    """Return the arguments of ``flash_attention`` as a call; raise what is wrong with them."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_heads(q, k, v, packed)
    B = _check_packed(q, cu_seqlens_q, cu_seqlens_k, leftpad_k)
    if not (leftpad_k is seqused_q is seqused_k is None):
        _check_lengths(B, q.device, leftpad_k=leftpad_k, seqused_q=seqused_q, seqused_k=seqused_k)
    _check_mask(mask, q, k, B, packed)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap`: expected a positive number, got {softcap}")
    return Call(
        mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        cu_seqlens_q, cu_seqlens_k, leftpad_k, seqused_q, seqused_k,
    )  # fmt: skip


def apart(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Call]:
    """Return ``v`` and the call with views of what is given twice.

    torch.compile traces no call of a registered op that takes the same tensor twice.
    """
    v = v.view_as(v) if v is k else v
    starts = call.cu_seqlens_k
    if starts is not None and starts is call.cu_seqlens_q:
        call = replace(call, cu_seqlens_k=starts.view_as(starts))
    return v, call


def check_heads(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """Raise what is wrong with the dtypes, devices and shapes of q, k and v, by name."""
    if not _fit(q, k, v, packed):
        _explain_tensors(q, k, v, packed)


def _fit(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> bool:
    """Tell at a glance whether ``_explain_tensors`` has nothing to say: most calls are right."""
    if not type(q) is type(k) is type(v) is Tensor or not q.dtype == k.dtype == v.dtype:
        return False
    a, b, c = q.shape, k.shape, v.shape
    if not len(a) == len(b) == len(c) == (3 if packed else 4):
        return False
    return (
        q.dtype in FLOATS
        and q.device == k.device == v.device
        and (packed or a[0] == b[0])
        and b[:-1] == c[:-1]
        and a[-1] == b[-1] > 0
        and c[-1] > 0
        and b[-2] > 0
        and a[-2] % b[-2] == 0
    )


def _explain_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """Raise what is wrong with q, k and v, by name, if anything is."""
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    rows = "T" if packed else "B Tq"
    check_shape("q", q, f"{rows} H D")
    H, D = q.shape[-2:]
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value)
        check_dtype(name, value, q.dtype)
        check_device(name, value, q.device)
    sizes = {"D": D} if packed else {"B": q.shape[0], "D": D}
    check_shape("k", k, "T Hk D" if packed else "B Tk Hk D", **sizes)
    *lead, Hk, _ = k.shape
    known = {"T": lead[0]} if packed else {"B": lead[0], "Tk": lead[1]}
    check_shape("v", v, "T Hk Dv" if packed else "B Tk Hk Dv", **known, Hk=Hk)
    if Hk == 0 or H % Hk:
        raise ValueError(f"`k`: expected heads that divide the {H} of `q`, got {Hk}")
    if D == 0 or v.shape[-1] == 0:
        raise ValueError("`q`, `v`: expected heads of at least one value")


def _check_lengths(B: int, device: torch.device, **lengths: Tensor | None) -> None:
    for name, value in lengths.items():
        if value is not None:
            check_tensor(name, value)
            check_dtype(name, value, torch.int32)
            check_shape(name, value, "B", B=B)
            check_device(name, value, device)


def _check_mask(mask: Mask, q: Tensor, k: Tensor, B: int, packed: bool) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"`mask`: expected a Mask, got {type(mask).__name__}")
    H = q.shape[-2]
    if len(mask.dilations) not in (1, H):
        raise ValueError(f"`mask`: expected one dilation or {H}, got {len(mask.dilations)}")
    tokens, start = mask.global_tokens, mask.dense_from
    if isinstance(tokens, Tensor):
        dims = "T" if packed else "B Tk"
        sizes = dict(zip(dims.split(), k.shape))
        check_shape("mask.global_tokens", tokens, dims, **sizes)
        check_device("mask.global_tokens", tokens, q.device)
    if isinstance(start, Tensor):
        check_shape("mask.dense_from", start, "B", B=B)
        check_device("mask.dense_from", start, q.device)


def _check_packed(
    q: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, leftpad: Tensor | None
) -> int:
    """Return the batch size."""
    if cu_q is None and cu_k is None:
        return q.shape[0]
    if cu_q is None or cu_k is None:
        raise ValueError("`cu_seqlens_q`, `cu_seqlens_k`: expected both or neither")
    if leftpad is not None:
        raise ValueError("`leftpad_k`: packed sequences have no padding to the left")
    for name, value in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check_tensor(name, value)
        check_dtype(name, value, torch.int32)
        check_shape(name, value, "B+1", **{"B+1": cu_q.numel()})
        check_device(name, value, q.device)
    if cu_q.numel() == 0:
        raise ValueError("`cu_seqlens_q`: expected [B+1] with B at least 0, got [0]")
    return cu_q.numel() - 1
