"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launchers import LARGEST_HEAD, inner_contiguous
from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.reference import (
    selected_attention_backward_reference,
    selected_attention_reference,
    selected_keys,
)
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.device import smallest_dot

Gradients = tuple[Tensor, Tensor, Tensor]

# values of gathered keys at a time: what the formula takes does not grow with the length
_GATHERED = 2**25


@dataclass(frozen=True)
class _Part:
    """Some queries of one packed sequence, or of all rows.

    Attributes:
        rows: of q, by sequence.
        keys: of k and v, by sequence.
        j: places of the chosen keys among ``keys``.
        visible: which of them a query sees.
    """

    rows: slice
    keys: slice
    j: Tensor
    visible: Tensor


def _parts(q: Tensor, k: Tensor, call: SelectedCall) -> Iterator[_Part]:
    """Yield what is computed at a time; q [B Tq H D], of packed sequences B is 1."""
    if call.cu_seqlens is None:
        sequences = [(0, q.shape[1], 0, k.shape[1])]
    else:
        ends = call.cu_seqlens.tolist()
        sequences = [(start, end, start, end) for start, end in itertools.pairwise(ends)]
    indices = call.indices if call.cu_seqlens is None else call.indices[None]
    of_query = q.shape[0] * indices.shape[-1] * k.shape[2] * call.block * k.shape[-1]
    step = max(1, _GATHERED // of_query)
    for q0, q1, k0, k1 in sequences:
        for first in range(q0, q1, step):
            rows = slice(first, min(first + step, q1))
            # the last query stands at the last key
            positions = torch.arange(rows.start - q1, rows.stop - q1, device=q.device) + (k1 - k0)
            j, visible = selected_keys(
                indices[:, rows], block=call.block, positions=positions, Tk=k1 - k0,
                causal=call.causal, leftpad=call.leftpad,
            )  # fmt: skip
            yield _Part(rows, slice(k0, k1), j, visible)


def _reference_fwd(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    packed = q.ndim == 3
    wide = [t.float()[None] if packed else t.float() for t in (q, k, v)]
    B, Tq, H, _ = wide[0].shape
    out = wide[0].new_zeros(B, Tq, H, v.shape[-1])
    lse = wide[0].new_full((B, H, Tq), float("-inf"))
    for part in _parts(wide[0], wide[1], call):
        rows, keys = part.rows, part.keys
        out[:, rows], lse[..., rows] = selected_attention_reference(
            wide[0][:, rows], wide[1][:, keys], wide[2][:, keys], part.j, part.visible,
            scale=call.scale,
        )  # fmt: skip
    out = out.to(q.dtype)
    return (out[0], lse[0]) if packed else (out, lse)


def _reference_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: SelectedCall,
) -> Gradients:  # fmt: skip
    packed = q.ndim == 3
    given = (dout, q, k, v, out, lse)
    wide = [t.float()[None] if packed else t.float() for t in given]
    dout, queries, k, v, out, lse = wide
    if dlse is not None:
        dlse = dlse[None] if packed else dlse
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(k), torch.zeros_like(v)
    for part in _parts(queries, k, call):
        rows, keys = part.rows, part.keys
        dq[:, rows], more_dk, more_dv = selected_attention_backward_reference(
            dout[:, rows], None if dlse is None else dlse[..., rows],
            queries[:, rows], k[:, keys], v[:, keys], (out[:, rows], lse[..., rows]),
            part.j, part.visible, scale=call.scale,
        )  # fmt: skip
        dk[:, keys] += more_dk
        dv[:, keys] += more_dv
    grads = (t.to(q.dtype) for t in (dq, dk, dv))
    first, second, third = (t[0] for t in grads) if packed else grads
    return first, second, third


def _triton_fwd(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.selected_blocks.launch import launch_forward

    q, k, v = inner_contiguous(q, k, v)
    if call.scale <= 0:
        # the softmax scales what it subtracts, by a positive factor
        q, call = -q, replace(call, scale=-call.scale or torch.finfo(torch.float32).tiny)
    return launch_forward(q, k, v, call)


def _triton_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: SelectedCall,
) -> Gradients:  # fmt: skip
    from bitnet_triton.kernels.selected_blocks.launch import launch_backward

    dlse = None if dlse is None else dlse.contiguous()
    q, k, v = inner_contiguous(q, k, v)
    out, lse = out.contiguous(), lse.contiguous()
    return launch_backward(dout.contiguous(), dlse, q, k, v, out, lse, call)


def _triton_objection(q: Tensor, v: Tensor, call: SelectedCall) -> str | None:
    widest, largest = max(q.shape[-1], v.shape[-1]), LARGEST_HEAD
    if q.dtype == torch.float32 and smallest_dot(q.device) > 1:
        # products of float32 run in registers there, and larger heads do not fit into them
        largest //= 2
    return None if widest <= largest else f"heads have at most {largest} values"


SELECTED_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    "reference": Implementation(_reference_fwd),
}
SELECTED_BWD = {
    "triton": Implementation(_triton_bwd, _triton_objection),
    "reference": Implementation(_reference_bwd),
}
