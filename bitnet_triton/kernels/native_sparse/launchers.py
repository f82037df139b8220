"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launchers import LARGEST_HEAD, inner_contiguous
from bitnet_triton.kernels.native_sparse.arguments import Results, SparseCall, empty_results
from bitnet_triton.kernels.native_sparse.reference import (
    block_scores_reference,
    compressed_attention_reference,
    select_reference,
)
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.device import smallest_dot

# selection scores of a tile are summed in registers
_LARGEST_RATIO = 32


def triton_objection(q: Tensor, v: Tensor, call: SparseCall) -> str | None:
    """Say why no kernel computes this; None when one does."""
    largest = LARGEST_HEAD
    if q.dtype == torch.float32 and smallest_dot(q.device) > 1:
        largest //= 2  # products of float32 run in registers there
    if max(q.shape[-1], v.shape[-1]) > largest:
        return f"heads have at most {largest} values"
    if call.blocks.ratio > _LARGEST_RATIO:
        return f"selection blocks have at most {_LARGEST_RATIO} strides"
    return None


def _triton_fwd(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Results:
    # Triton is imported on first use: that takes longer than this package
    from bitnet_triton.kernels.native_sparse.decode import launch_compressed_decode
    from bitnet_triton.kernels.native_sparse.launch import launch_forward

    q, k, v = inner_contiguous(q, k, v)
    q, call = _positive_scale(q, call)
    if call.cu_seqlens is None and q.shape[1] == 1 and call.attend and not call.keeps_lse:
        out, indices = launch_compressed_decode(
            q, k, v, blocks=call.blocks, scale=call.scale, tokens=call.tokens,
            selects=call.select, leftpad=call.leftpad,
        )  # fmt: skip
        return out, q.new_empty(0), indices
    return launch_forward(q, k, v, call)


def _positive_scale(q: Tensor, call: SparseCall) -> tuple[Tensor, SparseCall]:
    """Return the same attention with a positive factor: the softmax scales what it subtracted."""
    if call.scale > 0:
        return q, call
    return -q, replace(call, scale=-call.scale or torch.finfo(torch.float32).tiny)


def _triton_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: SparseCall
) -> Results:
    from bitnet_triton.kernels.native_sparse.launch import launch_backward

    q, k, v = inner_contiguous(q, k, v)
    return launch_backward(dout.contiguous(), q, k, v, out, lse, call)


def _sequences(q: Tensor, call: SparseCall) -> Iterator[tuple[int, slice, int, int, int]]:
    """Yield of each sequence: its row, its valid queries, where its keys start, positions of both.

    The last two are the position of the first query, and how many tokens there are.
    """
    rows = call.rows(q)
    if rows is None:
        for b in range(q.shape[0]):
            yield b, slice(0, q.shape[1]), 0, call.tokens - q.shape[1], call.tokens
        return
    for b, (start, length, first, before) in enumerate(rows.tolist()):
        row = 0 if call.cu_seqlens is not None else b
        yield row, slice(start, start + length), first, before, before + length


def _batched(call: SparseCall, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[None] for t in tensors) if call.cu_seqlens is not None else tensors


def _reference_fwd(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Results:
    """Attend and select by the formulas, sequence by sequence."""
    results = empty_results(q, k, v, call)
    q, k, v, out, lse, indices = _batched(call, q, k, v, *results)
    for t, value in ((out, 0.0), (lse, float("-inf")), (indices, -1)):
        t.fill_(value)
    blocks = call.blocks
    for b, i, first, before, tokens in _sequences(q, call):
        j = slice(first, first + blocks.compressed(tokens))
        parts = (t[b : b + 1, s].float() for t, s in ((q, i), (k, j), (v, j)))
        o, e, weights = compressed_attention_reference(
            *parts, blocks=blocks, scale=call.scale, before=before
        )
        if call.attend:
            out[b, i] = o[0].to(out.dtype)
        if call.keeps_lse:
            lse[b, :, i] = e[0]
        if call.select:
            scores = block_scores_reference(
                weights, blocks=blocks, Hk=k.shape[2], count=-(-tokens // blocks.selection)
            )
            indices[b, i] = select_reference(scores, blocks=blocks, before=before)[0]
    return results


def _reference_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: SparseCall
) -> Results:
    """Return the gradients by autograd of the formula."""
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = _batched(call, *grads)
    dout, q, k, v = _batched(call, dout, q, k, v)
    for b, i, first, before, tokens in _sequences(q, call):
        j = slice(first, first + call.blocks.compressed(tokens))
        parts = [
            t[b : b + 1, s].float().detach().requires_grad_() for t, s in ((q, i), (k, j), (v, j))
        ]
        with torch.enable_grad():
            o, _, _ = compressed_attention_reference(
                *parts, blocks=call.blocks, scale=call.scale, before=before
            )
        found = torch.autograd.grad(o, parts, dout[b : b + 1, i].float())
        for grad, part, s in zip((dq, dk, dv), found, (i, j, j)):
            grad[b, s] = part[0].to(grad.dtype)
    return grads


COMPRESSED_FWD = {
    "triton": Implementation(_triton_fwd, triton_objection),
    "reference": Implementation(_reference_fwd),
}
COMPRESSED_BWD = {
    "triton": Implementation(_triton_bwd, triton_objection),
    "reference": Implementation(_reference_bwd),
}
