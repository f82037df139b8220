"""Pooling tokens into overlapping blocks: the launchers of each backend, and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_triton.kernels.native_sparse.arguments import block_starts, block_tokens
from bitnet_triton.kernels.native_sparse.blocks import count_blocks
from bitnet_triton.runtime import (
    Implementation,
    register_op,
    remember_backend,
    remembered_backend,
    select,
)


def block_count(x: Tensor, block: int, stride: int, cu_seqlens: Tensor | None) -> int:
    """Return how many blocks there is room for: all packed sequences together have no more."""
    if cu_seqlens is not None:
        return x.shape[0] // stride
    return count_blocks(x.shape[1], block, stride)


def gather_tokens(x: Tensor, first: Tensor, start: int, stop: int) -> Tensor:
    """Return tokens ``start`` .. ``stop`` of each block, [B N n Hk D] ([N n Hk D] where packed).

    ``first`` is what ``block_tokens`` returns; blocks that are none give zeros.
    """
    index = first[..., None] + torch.arange(start, stop, device=x.device)
    is_block = (first >= 0)[..., None, None, None]
    index = index.clamp(min=0, max=x.shape[-3] - 1).long()
    if first.ndim == 1:
        found = x[index]
    else:
        found = x[torch.arange(x.shape[0], device=x.device)[:, None, None], index]
    return found.where(is_block, torch.zeros((), dtype=x.dtype, device=x.device))


def token_places(
    x: Tensor, *, block: int, stride: int, cu_seqlens: Tensor | None, leftpad: Tensor | None
) -> Tensor | None:
    """Return for each token its position, the first block of its sequence, and their number.

    int32 [3 B T], [3 T] where packed; None: token t stands at t, and no block is left out.
    """
    T = x.shape[-3]
    t = torch.arange(T, device=x.device, dtype=torch.int32)
    if cu_seqlens is not None:
        first = block_starts(cu_seqlens, block=block, stride=stride)
        b = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
        b = b.clamp(max=first.numel() - 2)
        return torch.stack((t - cu_seqlens[b], first[b], first.diff()[b])).int()
    if leftpad is not None:
        place = t - leftpad[:, None]
        count = (T - leftpad - block + stride).clamp(min=0) // stride
        return torch.stack((place, place * 0, count[:, None].expand_as(place))).int()
    return None


def _triton_fwd(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    from bitnet_triton.kernels.native_sparse.pool import launch_pool

    count = block_count(x, block, stride, cu_seqlens)
    first = block_tokens(
        x.shape[-3], block=block, stride=stride, cu_seqlens=cu_seqlens, leftpad=leftpad
    )
    return launch_pool(_rows(x), weights, first, count, block, stride)


def _triton_bwd(
    dy: Tensor, x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None,
    leftpad: Tensor | None, block: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from bitnet_triton.kernels.native_sparse.pool import launch_pool_bwd, launch_pool_bwd_dw

    lengths: Any = {"cu_seqlens": cu_seqlens, "leftpad": leftpad}
    places = token_places(x, block=block, stride=stride, **lengths)
    dy = dy.contiguous()
    dx = launch_pool_bwd(dy, weights, places, x.shape[-3], block, stride)
    if weights is None:
        return dx, x.new_empty(0)
    first = block_tokens(x.shape[-3], block=block, stride=stride, **lengths)
    return dx, launch_pool_bwd_dw(dy, _rows(x), weights, first, block, stride)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _reference_fwd(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    tokens = _windows(x, cu_seqlens, leftpad, block, stride).float()
    if weights is None:
        return tokens.mean(-3).to(x.dtype)
    return torch.einsum("...rhd,hr->...hd", tokens, weights.float()).to(x.dtype)


def _reference_bwd(
    dy: Tensor, x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None,
    leftpad: Tensor | None, block: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = [t.float().detach().requires_grad_() for t in (x, weights) if t is not None]
    with torch.enable_grad():
        tokens = _windows(wide[0], cu_seqlens, leftpad, block, stride)
        y = tokens.mean(-3)
        if weights is not None:
            y = torch.einsum("...rhd,hr->...hd", tokens, wide[1])
    dx, *more = torch.autograd.grad(y, wide, dy.float())
    return dx.to(x.dtype), more[0].to(x.dtype) if more else x.new_empty(0)


def _windows(
    x: Tensor, cu_seqlens: Tensor | None, leftpad: Tensor | None, block: int, stride: int
) -> Tensor:
    first = block_tokens(
        x.shape[-3], block=block, stride=stride, cu_seqlens=cu_seqlens, leftpad=leftpad
    )
    if first is None:
        count = count_blocks(x.shape[1], block, stride)
        first = torch.arange(count, device=x.device).expand(x.shape[0], -1) * stride
    return gather_tokens(x, first, 0, block)


POOL_FWD = {
    "triton": Implementation(_triton_fwd),
    "reference": Implementation(_reference_fwd),
}
POOL_BWD = {
    "triton": Implementation(_triton_bwd),
    "reference": Implementation(_reference_bwd),
}


def _launch_fwd(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    empty = _fake_fwd(x, weights, cu_seqlens, leftpad, block, stride)
    if empty.numel() == 0:
        return empty
    run = select("compress_blocks", POOL_FWD, x.device)
    return run(x, weights, cu_seqlens, leftpad, block, stride)


def _fake_fwd(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    *lead, Hk, D = x.shape
    return x.new_empty([*lead[:-1], block_count(x, block, stride, cu_seqlens), Hk, D])


def _launch_bwd(
    dy: Tensor, x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None,
    leftpad: Tensor | None, block: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if dy.numel() == 0:
        return torch.zeros_like(x), x.new_zeros([0] if weights is None else weights.shape)
    run = select("compress_blocks_bwd", POOL_BWD, x.device)
    return run(dy, x, weights, cu_seqlens, leftpad, block, stride)


def _fake_bwd(
    dy: Tensor, x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None,
    leftpad: Tensor | None, block: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty([0] if weights is None else weights.shape)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
        block: int, stride: int,
    ) -> Tensor:  # fmt: skip
        return _pool_fwd(x, weights, cu_seqlens, leftpad, block, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.block, ctx.stride = inputs
        ctx.save_for_backward(*tensors)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weights, cu_seqlens, leftpad = ctx.saved_tensors
        with remembered_backend(ctx):
            dx, dw = _pool_bwd(dy, x, weights, cu_seqlens, leftpad, ctx.block, ctx.stride)
        return dx, None if weights is None else dw, None, None, None, None


_pool_bwd = register_op("compress_blocks_bwd", _launch_bwd, _fake_bwd)
_pool_fwd = register_op("compress_blocks_fwd", _launch_fwd, _fake_fwd, function=_Pool)


def pool(
    x: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, leftpad: Tensor | None,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    """Sum the tokens of each block with ``weights`` [Hk block]; None: their mean."""
    wanted = x.requires_grad or (weights is not None and weights.requires_grad)
    eager = torch.is_grad_enabled() and wanted and not torch.compiler.is_compiling()
    return (_Pool.apply if eager else _pool_fwd)(x, weights, cu_seqlens, leftpad, block, stride)
