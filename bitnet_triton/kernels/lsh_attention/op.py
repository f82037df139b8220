"""The public attention of Reformer: checks, the choice of a backend, and the gradient."""

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
from bitnet_triton.kernels.lsh_attention.arguments import BucketCall
from bitnet_triton.kernels.lsh_attention.buckets import check_count, find_places, hash_buckets
from bitnet_triton.kernels.lsh_attention.launchers import BUCKET_BWD, BUCKET_FWD
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import register_op, remember_backend, remembered_backend, select

PATTERNS = ("window", "chunk")


def _launch_fwd(qk: Tensor, v: Tensor, call: BucketCall) -> tuple[Tensor, Tensor]:
    if qk.numel() == 0 or v.numel() == 0:
        return _fake_fwd(qk, v, call)
    return select("bucket_attention", BUCKET_FWD, qk.device, qk, v)(qk, v, call)


def _fake_fwd(qk: Tensor, v: Tensor, call: BucketCall) -> tuple[Tensor, Tensor]:
    B, T, H, _ = qk.shape
    return v.new_empty(v.shape), qk.new_empty([B, H, T], dtype=torch.float32)


def _launch_bwd(
    dout: Tensor, qk: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    if qk.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(qk), torch.zeros_like(v)
    run = select("bucket_attention_bwd", BUCKET_BWD, qk.device, qk, v)
    return run(dout, qk, v, out, lse, call)


def _fake_bwd(
    dout: Tensor, qk: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    return qk.new_empty(qk.shape), v.new_empty(v.shape)


class _BucketAttention(torch.autograd.Function):
    """Takes a ``BucketCall``, or its parts as the rule of the registered op."""

    @staticmethod
    def forward(qk: Tensor, v: Tensor, call: BucketCall) -> tuple[Tensor, Tensor]:
        return _bucket_fwd(qk, v, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        qk, v, *rest = inputs
        ctx.inputs = len(inputs)
        ctx.call = rest[0] if len(rest) == 1 else BucketCall.build(*rest)
        # saved as well: autograd tells when one has changed since
        ctx.save_for_backward(qk, v, *output, *ctx.call.tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        qk, v, out, lse, *_ = ctx.saved_tensors
        if dout is None:
            return (None,) * ctx.inputs
        with remembered_backend(ctx):
            grads = _bucket_bwd(dout, qk, v, out, lse, ctx.call)
        return *grads, *[None] * (ctx.inputs - 2)


_bucket_bwd = register_op("bucket_attention_bwd", _launch_bwd, _fake_bwd, bundle=BucketCall)
_bucket_fwd = register_op(
    "bucket_attention_fwd", _launch_fwd, _fake_fwd, function=_BucketAttention, bundle=BucketCall
)


def bucket_attention(
    qk: Tensor,
    v: Tensor,
    numbers: Tensor,
    *,
    window: int,
    pattern: str = "window",
    causal: bool = True,
    scale: float | None = None,
    leftpad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend to near tokens of the same bucket, in any of several rounds of buckets.

    ``softmax(scale q k^T) v`` with ``k = q / |q|`` over all tokens that a round shows, each once
    however many rounds show it: exact attention over the union of the rounds. A token sees itself
    only if it sees nothing else. Time and memory are linear in the number of tokens. Result and
    gradients are deterministic; the choice has no gradient.

    Args:
        qk: [B T H D] float16, bfloat16 or float32: queries, which are keys at length 1;
            [sum T, H, D] for packed sequences.
        v: [B T H Dv] in the dtype of ``qk``; as many heads, since each query is a key.
        numbers: int32 [B T H R], not negative: the bucket of each token in each of R rounds.
        window: "window": how many tokens of its bucket a token sees, itself included, up to itself
            (and as many behind itself, if not causal). "chunk": tokens of a chunk.
        pattern: "window", where what a token sees does not depend on later ones; or "chunk", as
            published: all tokens, sorted by bucket and position, are cut into chunks, and a token
            sees what its own chunk and the one before (and behind, if not causal) have of its
            bucket.
        causal: a token sees none behind itself. Default: True.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        leftpad: int32 [B], the first token of each row that counts. Those before it are seen by
            nobody and give zeros.
        cu_seqlens: int32 [B + 1], where each packed sequence starts, and the number of tokens.

    Returns:
        [B T H Dv], or [sum T, H, Dv], in the dtype of ``qk``; differentiable in ``qk`` and ``v``.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``window`` is no integer.
        ValueError: shapes do not fit, a tensor is on another device, ``window`` is not positive,
            ``pattern`` is unknown, or ``leftpad`` meets packed sequences.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check_tensors(qk, v, numbers, leftpad, cu_seqlens)
    check_count("window", window, 1)
    if pattern not in PATTERNS:
        raise ValueError(f"`pattern`: expected 'window' or 'chunk', got {pattern!r}")
    if cu_seqlens is not None:
        qk, v, numbers = qk[None], v[None], numbers[None]
    in_order = numbers.permute(3, 0, 2, 1).contiguous()
    # a window that reaches further than the text would overflow sums of places
    window = min(window, max(qk.shape[1], 1))
    order, rank, low, ahead = find_places(
        in_order, [cu_seqlens, leftpad], window, pattern == "chunk"
    )
    scale = qk.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling() and v is qk:
        v = v.view_as(v)  # no call of a registered op is traced that takes the same tensor twice
    call = BucketCall(order, rank, low, ahead, causal, scale)
    wants_gradient = torch.is_grad_enabled() and (qk.requires_grad or v.requires_grad)
    # a tracer sees the registered op, which has the same gradient
    eager = wants_gradient and not torch.compiler.is_compiling()
    out = (_BucketAttention.apply if eager else _bucket_fwd)(qk, v, call)[0]
    return out if cu_seqlens is None else out[0]


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    rounds: int,
    buckets: int,
    window: int,
    pattern: str = "window",
    causal: bool = True,
    seed: int = 0,
    scale: float | None = None,
    leftpad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend as Reformer does: to near tokens that random rotations put into the same bucket.

    ``hash_buckets`` and ``bucket_attention`` in one (arXiv:2001.04451). Queries and keys are
    shared, so there are as many heads of values as of queries.

    Args:
        qk: [B T H D] float16, bfloat16 or float32; [sum T, H, D] for packed sequences.
        v: [B T H Dv] in the dtype of ``qk``.
        rounds: how many times to hash; more of them find more. A round does not depend on how
            many there are.
        buckets: of a round; even, above 128 a multiple of 4. The paper takes 2 T / window.
        window: as for ``bucket_attention``, and so are the arguments not listed here.
        pattern: "window" or "chunk".
        causal: a token sees none behind itself. Default: True.
        seed: of the rotations, which all heads share.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        leftpad: int32 [B].
        cu_seqlens: int32 [B + 1].

    Returns:
        [B T H Dv], or [sum T, H, Dv], in the dtype of ``qk``; differentiable in ``qk`` and ``v``.

    Raises:
        TypeError: a tensor has a wrong dtype, or a number is no integer.
        ValueError: as for ``bucket_attention``, or a number is too small, or ``buckets`` is odd.
        BackendUnavailableError: the forced backend cannot run.
    """
    numbers = hash_buckets(qk, rounds=rounds, buckets=buckets, seed=seed)
    return bucket_attention(
        qk, v, numbers, window=window, pattern=pattern, causal=causal, scale=scale,
        leftpad=leftpad, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _check_tensors(
    qk: Tensor, v: Tensor, numbers: Tensor, leftpad: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    packed = cu_seqlens is not None
    tokens = "T" if packed else "B T"
    check_tensor("qk", qk)
    check_dtype("qk", qk, *FLOATS)
    check_shape("qk", qk, f"{tokens} H D")
    sizes = dict(zip(f"{tokens} H".split(), qk.shape))
    for name, t, dims in (("v", v, "H Dv"), ("numbers", numbers, "H R")):
        check_tensor(name, t)
        check_dtype(name, t, torch.int32 if t is numbers else qk.dtype)
        check_shape(name, t, f"{tokens} {dims}", **sizes)
        check_device(name, t, qk.device)
    if numbers.shape[-1] == 0:
        raise ValueError(f"`numbers`: expected at least one round, got {list(numbers.shape)}")
    if packed and leftpad is not None:
        raise ValueError("`leftpad`: packed sequences have no padding to the left")
    for name, lengths, count in (("leftpad", leftpad, "B"), ("cu_seqlens", cu_seqlens, "B+1")):
        if lengths is not None:
            check_tensor(name, lengths)
            check_dtype(name, lengths, torch.int32)
            check_shape(name, lengths, count, **({} if packed else sizes))
            check_device(name, lengths, qk.device)
