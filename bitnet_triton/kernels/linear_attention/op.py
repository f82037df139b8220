"""The public linear attention: checks, the choice of a backend, and the gradient."""

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
from bitnet_triton.kernels.common.linear import FLOATS, wants_gradient
from bitnet_triton.kernels.flash_attention.checks import check_heads
from bitnet_triton.kernels.linear_attention.launchers import LINEAR_BWD, LINEAR_FWD
from bitnet_triton.kernels.linear_attention.reference import normalised, with_sum_of_keys
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select

_INPUTS = 6  # tensors with a gradient


def _launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0:
        out, state = _fake_fwd(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, wide)
        return out.zero_(), state.zero_() if initial_state is None else state.copy_(initial_state)
    run = select("linear_attention", LINEAR_FWD, q.device, q, v)
    return run(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, wide)


def _fake_fwd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    Hk, D, Dv = *k.shape[-2:], v.shape[-1]
    return (
        q.new_empty([*q.shape[:-1], Dv], dtype=torch.float32 if wide else q.dtype),
        q.new_empty([B, Hk, D, Dv], dtype=torch.float32),
    )


def _launch_bwd(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0:
        grads = _fake_bwd(dout, dstate, q, k, v, log_decay, beta, initial_state, cu_seqlens, scale)
        for grad in grads:
            grad.zero_()
        if dstate is not None and initial_state is not None:
            grads[-1].copy_(dstate)
        return grads
    run = select("linear_attention_bwd", LINEAR_BWD, q.device, q, v)
    return run(dout, dstate, q, k, v, log_decay, beta, initial_state, cu_seqlens, scale)


def _fake_bwd(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return a tensor for every input; one that holds nothing for an input that is not given."""

    def like(t: Tensor | None) -> Tensor:
        return q.new_empty([0]) if t is None else t.new_empty(t.shape)

    return like(q), like(k), like(v), like(log_decay), like(beta), like(initial_state)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _linear_fwd(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        q, v = inputs[0], inputs[2]
        if dout is None:
            dout = q.new_zeros(*q.shape[:-1], v.shape[-1])
        with remembered_backend(ctx):
            grads = _linear_bwd(dout, dstate, *inputs, ctx.scale)
        given = [None if t is None else grad for t, grad in zip(inputs[:_INPUTS], grads)]
        return *given, None, None, None


_linear_bwd = register_op("linear_attention_bwd", _launch_bwd, _fake_bwd)
_linear_fwd = register_op("linear_attention_fwd", _launch_fwd, _fake_fwd, function=_LinearAttention)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a state of constant size, which every token decays and writes to.

    With a_t = exp(log_decay_t) the gated delta rule (arXiv:2412.06464, eq. 10; with a decay of
    each channel KDA, arXiv:2510.26692)::

        S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T
        out_t = scale S_t^T q_t

    Without ``beta`` a token only adds: S_t = a_t S_{t-1} + k_t v_t^T (arXiv:2006.16236). Computed
    in float32, in chunks of tokens; one token alone updates the state directly. The result and the
    gradients are deterministic. Feature maps and the normalisation of q and k are the caller's.

    Args:
        q: [B T H D] float16, bfloat16 or float32; [sum T, H, D] for packed sequences.
        k: [B T Hk D] in the dtype of ``q``, Hk divides H: the G = H / Hk query heads of a group
            read one state. For the delta rule of length 1, or beta |k|^2 at most 2: beyond, the
            state grows.
        v: [B T Hk Dv] in the dtype of ``q``.
        log_decay: [B T Hk], or [B T Hk D] for every channel of k, at most 0. Default: no decay.
        beta: [B T Hk], how far a token replaces what its key reads. Default: plain sums. Where
            beta and log_decay are 0 (or, without beta, k and log_decay) the state stays as it is.
        normalize: divide by the sum of the weights, q_t . sum of decayed k, plus 1e-10; 0 where
            that sum is 0. Meant for features that are not negative. Default: False.
        scale: multiplies ``q``. Default: ``D ** -0.5``.
        initial_state: float32 [B Hk D Dv], with ``normalize`` [B Hk D Dv+1], whose last column is
            the sum of keys. Default: zeros.
        return_state: return the last state as well, in that form.
        cu_seqlens: int32 [B + 1], where each packed sequence starts, and the number of tokens;
            each has a state of its own.

    Returns:
        ``out`` [B T H Dv] in the dtype of ``q``; with ``return_state`` also the state. Both are
        differentiable in all tensors.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, or ``normalize`` meets
            ``beta``, whose weights have any sign.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check(q, k, v, log_decay, beta, normalize, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if normalize:
        v = with_sum_of_keys(v)
    elif torch.compiler.is_compiling() and v is k:
        v = v.view_as(v)  # no call of a registered op is traced that takes the same tensor twice
    # a tracer sees the registered op, which has the same gradient
    eager = not torch.compiler.is_compiling() and wants_gradient(
        q, k, v, log_decay, beta, initial_state
    )
    out, state = (_LinearAttention.apply if eager else _linear_fwd)(
        q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, normalize
    )
    if normalize:
        # in float32: sums over many tokens overflow float16
        out = normalised(out[..., :-1], out[..., -1:]).to(q.dtype)
    return (out, state) if return_state else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    normalize: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    packed = cu_seqlens is not None
    check_heads(q, k, v, packed)
    rows = "T" if packed else "B T"
    known = dict(zip(rows.split(), q.shape))
    check_shape("k", k, f"{rows} Hk D", **known)
    B, (Hk, D), Dv = q.shape[0], k.shape[-2:], v.shape[-1]
    if cu_seqlens is not None:
        _check_own("cu_seqlens", cu_seqlens, q.device, torch.int32)
        check_shape("cu_seqlens", cu_seqlens, "B+1")
        if cu_seqlens.numel() == 0:
            raise ValueError("`cu_seqlens`: expected [B+1] with B at least 0, got [0]")
        B = cu_seqlens.numel() - 1
    if log_decay is not None:
        _check_own("log_decay", log_decay, q.device, *FLOATS)
        of_channels = log_decay.ndim == k.ndim
        dims = f"{rows} Hk D" if of_channels else f"{rows} Hk"
        check_shape("log_decay", log_decay, dims, **known, Hk=Hk, D=D)
    if beta is not None:
        _check_own("beta", beta, q.device, *FLOATS)
        check_shape("beta", beta, f"{rows} Hk", **known, Hk=Hk)
        if normalize:
            raise ValueError("`normalize`: expected no `beta`, whose weights have any sign")
    if initial_state is not None:
        _check_own("initial_state", initial_state, q.device, torch.float32)
        columns = {"Dv+1": Dv + 1} if normalize else {"Dv": Dv}
        dims = f"B Hk D {next(iter(columns))}"
        check_shape("initial_state", initial_state, dims, B=B, Hk=Hk, D=D, **columns)


def _check_own(name: str, value: Tensor, device: torch.device, *dtypes: torch.dtype) -> None:
    check_tensor(name, value)
    check_dtype(name, value, *dtypes)
    check_device(name, value, device)
