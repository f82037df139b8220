"""The public attention over chosen blocks: checks, the choice of a backend, and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.flash_attention.checks import check_heads
from bitnet_triton.kernels.selected_blocks.arguments import SelectedCall
from bitnet_triton.kernels.selected_blocks.launchers import SELECTED_BWD, SELECTED_FWD
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select


def _launch_fwd(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    if call.is_empty(q, k):
        out, lse = _fake_fwd(q, k, v, call)
        return out.zero_(), lse.fill_(float("-inf"))
    run = select("selected_block_attention", SELECTED_FWD, q.device, q, v, call)
    return run(q, k, v, call)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
    *lead, T, H, _ = q.shape
    return (
        q.new_empty([*lead, T, H, v.shape[-1]]),
        q.new_empty([*lead, H, T], dtype=torch.float32),
    )


def _launch_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: SelectedCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if call.is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = select("selected_block_attention_bwd", SELECTED_BWD, q.device, q, v, call)
    return run(dout, dlse, q, k, v, out, lse, call)


def _fake_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: SelectedCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _SelectedAttention(torch.autograd.Function):
    """Takes a ``SelectedCall``, or its parts as the rule of the registered op."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: SelectedCall) -> tuple[Tensor, Tensor]:
        return _selected_fwd(q, k, v, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, *rest = inputs
        ctx.inputs = len(inputs)
        ctx.call = rest[0] if len(rest) == 1 else SelectedCall.build(*rest)
        # saved as well: autograd tells when one has changed since
        ctx.save_for_backward(q, k, v, *output, *ctx.call.tensors)
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        with remembered_backend(ctx):
            grads = _selected_bwd(dout, dlse, q, k, v, out, lse, ctx.call)
        return *grads, *[None] * (ctx.inputs - 3)


_selected_bwd = register_op(
    "selected_block_attention_bwd", _launch_bwd, _fake_bwd, bundle=SelectedCall
)
_selected_fwd = register_op(
    "selected_block_attention_fwd", _launch_fwd, _fake_fwd, function=_SelectedAttention,
    bundle=SelectedCall,
)  # fmt: skip


def selected_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    block: int,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    leftpad: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to chosen blocks of keys, those of each query and key head.

    ``softmax(scale q k^T) v`` over the keys of the blocks in ``indices`` (the selection of
    arXiv:2502.11089, section 3.3.2), in float32. Block n holds the keys n * block up to
    (n + 1) * block - 1; query head h reads the blocks of key head h // (H / Hk). The last query
    stands at the last key. A query that sees no key gives zeros. The result and the gradients are
    deterministic; the choice has no gradient. On a CPU lists of many small blocks go over all keys
    with a mask: a key that is not finite may reach queries beside those that chose it there.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32; [sum T, H, D] for packed sequences.
        k: [B Tk Hk D] in the dtype of ``q``, Hk divides H; [sum T, Hk, D].
        v: [B Tk Hk Dv] in the dtype of ``q``; [sum T, Hk, Dv].
        indices: int32 [B Tq Hk S], the numbers of the blocks that a query reads, in any order;
            [sum T, Hk, S]. A negative number is none, wherever it stands, and so is one behind the
            last block. A number that a list has twice counts once.
        block: keys of a block; the last one may be shorter.
        causal: a query sees the keys up to its own place, inside of a block too. Default: True.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        cu_seqlens: int32 [B + 1], where each packed sequence starts, and the number of tokens.
            Blocks count from the first token of each sequence.
        leftpad: int32 [B], the first key of each row that counts; blocks count from there. Queries
            that stand before it are padding and give zeros. Default: 0.
        return_lse: return the logarithm of the sum of exponentials as well.

    Returns:
        ``out`` [B Tq H Dv] (or [sum T, H, Dv]) in the dtype of ``q``; with ``return_lse`` also
        float32 [B H Tq] (or [H, sum T]), -inf for a query without a key. Both are differentiable
        in ``q``, ``k`` and ``v``.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``block`` is no integer.
        ValueError: shapes do not fit, a tensor is on another device, ``block`` is not positive, or
            ``leftpad`` meets packed sequences.
        BackendUnavailableError: the forced backend cannot run.
    """
    packed = cu_seqlens is not None
    check_heads(q, k, v, packed)
    _check_choice(q, k, indices, block, packed)
    _check_lengths(q, k, cu_seqlens, leftpad)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling() and v is k:
        v = v.view_as(v)  # no call of a registered op is traced that takes the same tensor twice
    call = SelectedCall(indices, block, causal, scale, in_a_row(cu_seqlens), in_a_row(leftpad))
    wants_gradient = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
    )
    # a tracer sees the registered op, which has the same gradient
    eager = wants_gradient and not torch.compiler.is_compiling()
    out, lse = (_SelectedAttention.apply if eager else _selected_fwd)(q, k, v, call)
    return (out, lse) if return_lse else out


def _check_choice(q: Tensor, k: Tensor, indices: Tensor, block: int, packed: bool) -> None:
    check_tensor("indices", indices)
    check_dtype("indices", indices, torch.int32)
    Hk = k.shape[-2]
    if packed:
        check_shape("indices", indices, "T Hk S", T=q.shape[0], Hk=Hk)
    else:
        check_shape("indices", indices, "B Tq Hk S", B=q.shape[0], Tq=q.shape[1], Hk=Hk)
    check_device("indices", indices, q.device)
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"`block`: expected an integer, got {type(block).__name__}")
    if block < 1:
        raise ValueError(f"`block`: expected at least 1, got {block}")


def _check_lengths(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, leftpad: Tensor | None) -> None:
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        check_dtype("cu_seqlens", cu_seqlens, torch.int32)
        check_shape("cu_seqlens", cu_seqlens, "B+1")
        check_device("cu_seqlens", cu_seqlens, q.device)
        if cu_seqlens.numel() == 0:
            raise ValueError("`cu_seqlens`: expected [B+1] with B at least 0, got [0]")
        check_shape("k", k, "T Hk D", T=q.shape[0])
        if leftpad is not None:
            raise ValueError("`leftpad`: packed sequences have no padding to the left")
    if leftpad is not None:
        check_tensor("leftpad", leftpad)
        check_dtype("leftpad", leftpad, torch.int32)
        check_shape("leftpad", leftpad, "B", B=q.shape[0])
        check_device("leftpad", leftpad, q.device)
