"""Compressed attention with the choice of blocks, and the gated sum: registered ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.native_sparse.arguments import SparseCall, empty_results
from bitnet_triton.kernels.native_sparse.launchers import COMPRESSED_BWD, COMPRESSED_FWD
from bitnet_triton.runtime import (
    Implementation,
    register_op,
    remember_backend,
    remembered_backend,
    select,
)


def _launch_fwd(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    no_sequence = call.cu_seqlens is not None and call.cu_seqlens.numel() == 1
    if q.numel() == 0 or no_sequence:
        out, lse, indices = empty_results(q, k, v, call)
        return out.zero_(), lse.fill_(float("-inf")), indices.fill_(-1)
    return select("compressed_attention", COMPRESSED_FWD, q.device, q, v, call)(q, k, v, call)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(q, k, v, call)


def _launch_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: SparseCall
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = select("compressed_attention_bwd", COMPRESSED_BWD, q.device, q, v, call)
    return run(dout, q, k, v, out, lse, call)


def _fake_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: SparseCall
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _CompressedAttention(torch.autograd.Function):
    """Takes a ``SparseCall``, or its parts as the rule of the registered op."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> tuple[Tensor, Tensor, Tensor]:
        return _compressed_fwd(q, k, v, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, *rest = inputs
        ctx.inputs = len(inputs)
        ctx.call = rest[0] if len(rest) == 1 else SparseCall.build(*rest)
        out, lse, indices = output
        # saved as well: autograd tells when one has changed since
        given = [t for t in (ctx.call.cu_seqlens, ctx.call.leftpad) if t is not None]
        ctx.save_for_backward(q, k, v, out, lse, *given)
        ctx.mark_non_differentiable(lse, indices)
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple:
        q, k, v, out, lse, *_rest = ctx.saved_tensors
        nothing = [None] * (ctx.inputs - 3)
        if dout is None:
            return None, None, None, *nothing
        with remembered_backend(ctx):
            return *_compressed_bwd(dout, q, k, v, out, lse, ctx.call), *nothing


_compressed_bwd = register_op("compressed_attention_bwd", _launch_bwd, _fake_bwd, bundle=SparseCall)
_compressed_fwd = register_op(
    "compressed_attention_fwd", _launch_fwd, _fake_fwd,
    function=_CompressedAttention, bundle=SparseCall,
)  # fmt: skip


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, call: SparseCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to compressed keys and choose blocks, as far as ``call`` asks for it.

    Returns:
        out [B T H Dv], differentiable; lse float32 [B H T], kept for the gradient, and indices
        int32 [B T Hk selected], which are not. What nobody wants has no elements.
    """
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    call = replace(call, keeps_lse=call.attend and wanted)
    # a tracer sees the registered op, which has the same gradient
    eager = call.keeps_lse and not torch.compiler.is_compiling()
    return (_CompressedAttention.apply if eager else _compressed_fwd)(q, k, v, call)


def _triton_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    from bitnet_triton.kernels.native_sparse.gates import launch_gated_sum

    return launch_gated_sum(*(t.contiguous() for t in (a, b, c, gates)))


def _triton_sum_bwd(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bitnet_triton.kernels.native_sparse.gates import launch_gated_sum_bwd

    return launch_gated_sum_bwd(*(t.contiguous() for t in (dout, a, b, c, gates)))


def _reference_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    branches = torch.stack((a, b, c), dim=-2).float()
    return torch.einsum("...cd,...c->...d", branches, gates.float()).to(a.dtype)


def _reference_sum_bwd(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branches = torch.stack((a, b, c), dim=-2).float()
    dgates = torch.einsum("...cd,...d->...c", branches, dout.float()).to(gates.dtype)
    shares = dout.float()[..., None, :] * gates.float()[..., None]
    da, db, dc = shares.to(a.dtype).unbind(-2)
    return da.contiguous(), db.contiguous(), dc.contiguous(), dgates


GATED_SUM_FWD = {
    "triton": Implementation(_triton_sum),
    "reference": Implementation(_reference_sum),
}
GATED_SUM_BWD = {
    "triton": Implementation(_triton_sum_bwd),
    "reference": Implementation(_reference_sum_bwd),
}


def _launch_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    if a.numel() == 0:
        return torch.empty_like(a)
    return select("gated_sum", GATED_SUM_FWD, a.device)(a, b, c, gates)


def _fake_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _launch_sum_bwd(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if a.numel() == 0:
        return tuple(torch.zeros_like(t) for t in (a, b, c, gates))  # type: ignore[return-value]
    return select("gated_sum_bwd", GATED_SUM_BWD, a.device)(dout, a, b, c, gates)


def _fake_sum_bwd(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (a, b, c, gates))  # type: ignore[return-value]


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
        return _gated_sum(a, b, c, gates)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple:
        with remembered_backend(ctx):
            return _gated_sum_bwd(dout, *ctx.saved_tensors)


_gated_sum_bwd = register_op("gated_sum_bwd", _launch_sum_bwd, _fake_sum_bwd)
_gated_sum = register_op("gated_sum_fwd", _launch_sum, _fake_sum, function=_GatedSum)


def gated_sum(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    """Sum a, b and c [B T H D] by gates [B T H 3]."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, c, gates))
    eager = wanted and not torch.compiler.is_compiling()
    return (_GatedSum.apply if eager else _gated_sum)(a, b, c, gates)
