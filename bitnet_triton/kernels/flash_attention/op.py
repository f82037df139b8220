"""The public attention: checks, the choice of a backend, and the gradient."""

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
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.checks import apart, checked_call
from bitnet_triton.kernels.flash_attention.launchers import ATTENTION_BWD, ATTENTION_FWD
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.paged_call import (
    PagedCall,
    checked_paged_call,
    refuse_lengths,
)
from bitnet_triton.kernels.flash_attention.paged_op import paged_attention
from bitnet_triton.kernels.flash_attention.sink_logits import add_sink_logits
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select

CAUSAL = Mask()


def _launch_fwd(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    if call.is_empty(q, k):
        out, lse = _fake_fwd(q, k, v, call)
        return out.zero_(), lse.fill_(float("-inf"))
    return select("flash_attention", ATTENTION_FWD, q.device, q, v, call)(q, k, v, call)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    *rows, H, _ = q.shape
    lse_shape = [*rows[:-1], H, rows[-1]]
    return (
        q.new_empty([*rows, H, v.shape[-1]]),
        q.new_empty(lse_shape, dtype=torch.float32),
    )


def _launch_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if call.is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = select("flash_attention_bwd", ATTENTION_BWD, q.device, q, v, call)
    return run(dout, dlse, q, k, v, out, lse, call)


def _fake_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _FlashAttention(torch.autograd.Function):
    """Takes a ``Call``, or its parts as the rule of the registered op."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return _attention_fwd(q, k, v, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, *rest = inputs
        ctx.inputs = len(inputs)
        ctx.call = rest[0] if len(rest) == 1 else Call.build(*rest)
        # saved as well: autograd tells when one has changed since
        given = [t for t in ctx.call.tensors if t is not None]
        ctx.save_for_backward(q, k, v, *output, *given)
        # an lse that nothing depends on has no gradient, instead of one of zeros
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        with remembered_backend(ctx):
            grads = _attention_bwd(dout, dlse, q, k, v, out, lse, ctx.call)
        return *grads, *[None] * (ctx.inputs - 3)


_attention_bwd = register_op("flash_attention_bwd", _launch_bwd, _fake_bwd, bundle=Call)
_attention_fwd = register_op(
    "flash_attention_fwd", _launch_fwd, _fake_fwd, function=_FlashAttention, bundle=Call
)


def flash_attention(  # noqa: PLR0913 - lengths have the names that flash-attn gives them
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int | None = None,
    s_aux: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys that a mask shows, without a matrix of scores or of the mask.

    ``softmax(scale q k^T) v`` (arXiv:2205.14135, arXiv:2307.08691) over visible keys, in float32;
    with ``softcap`` c the scores are ``c tanh(s / c)``. Query head h reads key head h // (H / Hk).
    The last query stands at the last key; a query that sees no key gives zeros. The result and the
    gradients are deterministic.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32; [sum Tq, H, D] for packed sequences.
        k: [B Tk Hk D] in the dtype of ``q``, Hk divides H; [sum Tk, Hk, D].
        v: [B Tk Hk Dv] in the dtype of ``q``; [sum Tk, Hk, Dv].
        mask: which keys a query sees. Default: causal.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        softcap: largest magnitude of a score. Default: no bound.
        cu_seqlens_q: int32 [B + 1], where the queries of each packed sequence start, and their
            number.
        cu_seqlens_k: the same for keys; goes with ``cu_seqlens_q``.
        leftpad_k: int32 [B], the first valid key of each row, where positions begin. Queries that
            stand before it are padding and give zeros. Default: 0.
        seqused_q: int32 [B], number of valid queries of each row; those behind give zeros.
            Default: all.
        seqused_k: int32 [B], one past the last valid key of each row. Default: all.
        block_table: int32 [B N], the pages in which the keys of each row lie, in order: key j is
            token ``j % page_size`` of page ``block_table[b, j // page_size]``. ``k`` and ``v`` are
            then [P page_size Hk D] and [P page_size Hk Dv], ``seqused_k`` says how many keys a row
            has, and queries may be packed by ``cu_seqlens_q`` alone. Pages are read where they lie;
            there is no gradient. Masks are causal or not, with a window and sinks.
        page_size: tokens of a page, to be checked. Default: what ``k`` says.
        s_aux: [H] float16, bfloat16 or float32, learnable sinks (gpt-oss): a logit of each head
            that takes part in the softmax and has no value; -inf: none. Not scaled, not capped.
            Default: none. Keys that every query sees are ``Mask.sinks``.
        return_lse: return the logarithm of the sum of exponentials as well.

    Returns:
        ``out`` [B Tq H Dv] (or [sum Tq, H, Dv]) in the dtype of ``q``; with ``return_lse`` also
        float32 [B H Tq] (or [H, sum Tq]), -inf for a query without a key; with ``s_aux`` the sink
        is in the sum, and all that is in it for such a query. Both are differentiable in ``q``,
        ``k``, ``v`` and ``s_aux``.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``mask`` is no Mask.
        ValueError: shapes do not fit, a tensor is on another device, one of ``cu_seqlens_q`` and
            ``cu_seqlens_k`` is missing, ``leftpad_k`` meets packed sequences, or ``softcap`` is not
            positive; ``block_table`` without ``seqused_k``, with other lengths or masks than those
            above, or where a gradient is wanted.
        BackendUnavailableError: the forced backend cannot run.
    """
    seqused_q, seqused_k, leftpad_k = map(in_a_row, (seqused_q, seqused_k, leftpad_k))
    cu_seqlens_q, cu_seqlens_k = in_a_row(cu_seqlens_q), in_a_row(cu_seqlens_k)
    if block_table is not None:
        block_table = in_a_row(block_table)
        if not (cu_seqlens_k is leftpad_k is seqused_q is None):
            refuse_lengths(cu_seqlens_k=cu_seqlens_k, leftpad_k=leftpad_k, seqused_q=seqused_q)
        pages = checked_paged_call(
            q, k, v, mask, scale, softcap, block_table, page_size, cu_seqlens_q, seqused_k
        )
    else:
        if page_size is not None:
            raise ValueError("`page_size`: expected a `block_table` with it")
        call = checked_call(
            q, k, v, mask, scale, softcap, cu_seqlens_q, cu_seqlens_k, leftpad_k, seqused_q,
            seqused_k,
        )  # fmt: skip
    if s_aux is not None:
        check_tensor("s_aux", s_aux)
        check_dtype("s_aux", s_aux, *FLOATS)
        check_shape("s_aux", s_aux, "H", H=q.shape[-2])
        check_device("s_aux", s_aux, q.device)
    wants_gradient = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
    )
    out, lse = (
        _attend(q, k, v, call, wants_gradient)
        if block_table is None
        else _attend_to_pages(q, k, v, pages, wants_gradient)
    )
    if s_aux is not None:
        out, lse = add_sink_logits(out, lse, s_aux)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        v, call = apart(k, v, call)
        # a tracer sees the registered op, which has the same gradient
        return _attention_fwd(q, k, v, call)
    return (_FlashAttention.apply if wants_gradient else _attention_fwd)(q, k, v, call)


def _attend_to_pages(
    q: Tensor, k: Tensor, v: Tensor, call: PagedCall, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    if wants_gradient:
        raise ValueError("`block_table`: attention over pages has no gradient, use torch.no_grad()")
    return paged_attention(q, k, v.view_as(v) if v is k else v, call)
