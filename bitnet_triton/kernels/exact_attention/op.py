"""The public exact attention: for analysis, and as a baseline of what selects approximately."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.exact_attention.arguments import ExactCall
from bitnet_triton.kernels.exact_attention.launchers import EXACT_BWD, EXACT_FWD
from bitnet_triton.kernels.flash_attention.checks import apart, checked_call
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select

CAUSAL = Mask()


def _launch_fwd(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
    if exact.call.is_empty(q, k):
        out, lse = _fake_fwd(q, k, v, exact)
        return out.zero_(), lse.fill_(float("-inf"))
    return select("exact_attention", EXACT_FWD, q.device, q, v, exact)(q, k, v, exact)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
    *lead, T, H, _ = q.shape
    return (
        q.new_empty([*lead, T, H, v.shape[-1]]),
        q.new_empty([*lead, H, T], dtype=torch.float32),
    )


def _launch_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    exact: ExactCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if exact.call.is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = select("exact_attention_bwd", EXACT_BWD, q.device, q, v, exact)
    return run(dout, dlse, q, k, v, out, lse, exact)


def _fake_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    exact: ExactCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _ExactAttention(torch.autograd.Function):
    """Takes an ``ExactCall``, or its parts as the rule of the registered op."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
        return _exact_fwd(q, k, v, exact)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, *rest = inputs
        ctx.inputs = len(inputs)
        ctx.exact = rest[0] if len(rest) == 1 else ExactCall.build(*rest)
        # saved as well: autograd tells when one has changed since
        given = [t for t in ctx.exact.call.tensors if t is not None]
        ctx.save_for_backward(q, k, v, *output, *given)
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        with remembered_backend(ctx):
            grads = _exact_bwd(dout, dlse, q, k, v, out, lse, ctx.exact)
        return *grads, *[None] * (ctx.inputs - 3)


_exact_bwd = register_op("exact_attention_bwd", _launch_bwd, _fake_bwd, bundle=ExactCall)
_exact_fwd = register_op(
    "exact_attention_fwd", _launch_fwd, _fake_fwd, function=_ExactAttention, bundle=ExactCall
)


def exact_attention(  # noqa: PLR0913 - those of flash_attention, and what is selected
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys of the largest scores, or of large weights, among those that a mask shows.

    ``flash_attention`` over chosen keys. The choice is exact: all scores are computed, several
    times, and none is kept. This saves nothing; it says what a method that guesses should find.

    Args:
        q: as for ``flash_attention``; so are all arguments that are not explained here.
        k: [B Tk Hk D].
        v: [B Tk Hk Dv].
        top_k: each row takes its largest scores, so many; of equal ones the earlier key. Default:
            all.
        threshold: each row takes the weights of at least this share of its largest one, more than
            0, up to 1; together with ``top_k`` what both take. Default: all.
        mask: what to choose from. Default: causal.
        scale: multiplies the scores.
        softcap: largest magnitude of a score.
        cu_seqlens_q: int32 [B + 1].
        cu_seqlens_k: int32 [B + 1].
        leftpad_k: int32 [B].
        seqused_q: int32 [B].
        seqused_k: int32 [B].
        return_lse: return the logarithm of the sum of exponentials as well, over taken keys.

    Returns:
        As ``flash_attention``. Gradients take the choice as given.

    Raises:
        TypeError: as ``flash_attention``, or ``top_k`` is no integer.
        ValueError: as ``flash_attention``; neither ``top_k`` nor ``threshold`` is given, or one is
            out of range.
        BackendUnavailableError: the forced backend cannot run.
    """
    if top_k is None and threshold is None:
        raise ValueError("`top_k`, `threshold`: expected at least one of them")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise TypeError(f"`top_k`: expected an integer, got {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k`: expected at least 1, got {top_k}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"`threshold`: expected more than 0, up to 1, got {threshold}")
    call = checked_call(
        q, k, v, mask, scale, softcap, cu_seqlens_q, cu_seqlens_k, leftpad_k, seqused_q, seqused_k
    )
    if torch.compiler.is_compiling():
        v, call = apart(k, v, call)
    exact = ExactCall(call, top_k, threshold)
    wants_gradient = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
    )
    # a tracer sees the registered op, which has the same gradient
    eager = wants_gradient and not torch.compiler.is_compiling()
    out, lse = (_ExactAttention.apply if eager else _exact_fwd)(q, k, v, exact)
    return (out, lse) if return_lse else out
