"""The public functions that make the units which a choice of blocks compares."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_shape
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.top_blocks.reference import pool_keys_reference
from bitnet_triton.kernels.top_blocks.units import Kind, Units
from bitnet_triton.runtime import Implementation, register_op, select

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _triton_pool(
    k: Tensor, kind: str, stride: int, window: int, leftpad: Tensor | None, starts: Tensor | None
) -> Tensor:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.top_blocks.pool import launch_pool_keys, unit_columns

    units = Units(kind, stride, window)  # type: ignore[arg-type]
    k = k if k.stride(-1) == 1 else k.contiguous()
    B, T, Hk, D = k.shape
    out = k.new_zeros(B, units.rows(T), Hk, units.width(D))
    columns = None if starts is None else unit_columns(units, T, starts)
    if out.numel():
        last = units.rows(T)
        launch_pool_keys(k, out, units=units, last=last, leftpad=leftpad, columns=columns)
    return out


def _reference_pool(
    k: Tensor, kind: str, stride: int, window: int, leftpad: Tensor | None, starts: Tensor | None
) -> Tensor:
    units = Units(kind, stride, window)  # type: ignore[arg-type]
    if starts is None:
        left = [0] * k.shape[0] if leftpad is None else leftpad.tolist()
        pooled = [pool_keys_reference(row, units=units, leftpad=n) for row, n in zip(k, left)]
        return torch.stack(pooled)
    out = k.new_zeros(1, units.rows(k.shape[1]), k.shape[2], units.width(k.shape[3]))
    bounds = starts.tolist()
    for first, end in pairwise(bounds):
        part = pool_keys_reference(k[0, first:end], units=units)
        row = first // stride
        out[0, row : row + part.shape[0]] = part
    return out


def _launch_pool(
    k: Tensor, kind: str, stride: int, window: int, leftpad: Tensor | None, starts: Tensor | None
) -> Tensor:
    run = select("pool_keys", POOL_KEYS, k.device)
    return run(k, kind, stride, window, leftpad, starts)


def _fake_pool(
    k: Tensor, kind: str, stride: int, window: int, leftpad: Tensor | None, starts: Tensor | None
) -> Tensor:
    units = Units(kind, stride, window)  # type: ignore[arg-type]
    return k.new_empty(k.shape[0], units.rows(k.shape[1]), k.shape[2], units.width(k.shape[3]))


POOL_KEYS = {
    "triton": Implementation(_triton_pool),
    "reference": Implementation(_reference_pool),
}
_pool_keys = register_op("pool_keys", _launch_pool, _fake_pool)


def _triton_pool_last(
    k: Tensor, out: Tensor, kind: str, stride: int, window: int, last: int, leftpad: Tensor | None
) -> None:
    from bitnet_triton.kernels.top_blocks.pool import launch_pool_keys

    units = Units(kind, stride, window)  # type: ignore[arg-type]
    launch_pool_keys(k, out, units=units, last=last, leftpad=leftpad)


def _reference_pool_last(
    k: Tensor, out: Tensor, kind: str, stride: int, window: int, last: int, leftpad: Tensor | None
) -> None:
    units = Units(kind, stride, window)  # type: ignore[arg-type]
    left = [0] * k.shape[0] if leftpad is None else leftpad.tolist()
    for row, to, n in zip(k, out, left):
        whole = (row.shape[0] - n - window) // stride + 1  # units
        if whole > 0:
            pooled = pool_keys_reference(row, units=units, leftpad=n)
            end = n // stride + whole
            to[end - min(last, whole) : end] = pooled[end - min(last, whole) : end]


def _launch_pool_last(
    k: Tensor, out: Tensor, kind: str, stride: int, window: int, last: int, leftpad: Tensor | None
) -> None:
    run = select("pool_last_keys", POOL_LAST_KEYS, k.device)
    run(k, out, kind, stride, window, last, leftpad)


def _fake_pool_last(
    k: Tensor, out: Tensor, kind: str, stride: int, window: int, last: int, leftpad: Tensor | None
) -> None:
    pass


POOL_LAST_KEYS = {
    "triton": Implementation(_triton_pool_last),
    "reference": Implementation(_reference_pool_last),
}
_pool_last_keys = register_op(
    "pool_last_keys", _launch_pool_last, _fake_pool_last, mutates_args=("out",)
)


def pool_keys(
    k: Tensor,
    *,
    units: Units,
    leftpad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Sum up windows of neighbouring keys: their mean, or their bounds by channel.

    Args:
        k: [B T Hk D] float16, bfloat16 or float32; packed: [sum T, Hk, D].
        units: of kind "mean" or "bounds".
        leftpad: int32 [B], columns of padding in front; windows count from the first token.
        cu_seqlens: int32 [B + 1], where packed sequences start, from which windows count.

    Returns:
        [B T // stride Hk D], of bounds the largest and then the smallest entries, 2 D; packed
        [sum T // stride, Hk, ...]. Rows without a whole window are zeros. Not differentiable.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, or the units are tokens.
        BackendUnavailableError: the forced backend cannot run.
    """
    if units.kind == "token":
        raise ValueError("`units`: expected those of windows, the tokens' own are their keys")
    k = k.detach()
    if cu_seqlens is not None:
        if leftpad is not None:
            raise ValueError("`cu_seqlens`: goes without `leftpad`")
        check_dtype("cu_seqlens", cu_seqlens, torch.int32)
        k = k[None]
    check_dtype("k", k, *FLOATS)
    check_shape("k", k, "B T Hk D")
    if leftpad is not None:
        check_dtype("leftpad", leftpad, torch.int32)
        check_shape("leftpad", leftpad, "B", B=k.shape[0])
    kind: Kind = units.kind
    pooled = _pool_keys(
        k, kind, units.stride, units.window, in_a_row(leftpad), in_a_row(cu_seqlens)
    )
    return pooled if cu_seqlens is None else pooled[0]


def pool_last_keys(
    k: Tensor, out: Tensor, *, units: Units, last: int, leftpad: Tensor | None = None
) -> None:
    """Write the last units of each row of keys into the store of all of them, in place.

    Args:
        k: [B T Hk D] float16, bfloat16 or float32, last dimension contiguous.
        out: [B U Hk D], of bounds [B U Hk 2 D], in the dtype of ``k``, as ``pool_keys`` returns
            them with U at least T // stride. Other rows stay as they are.
        units: of kind "mean" or "bounds".
        last: how many units of each row; those that do not exist are not written.
        leftpad: int32 [B], columns of padding in front.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, or the units are tokens.
        BackendUnavailableError: the forced backend cannot run.
    """
    if units.kind == "token":
        raise ValueError("`units`: expected those of windows, the tokens' own are their keys")
    check_dtype("k", k, *FLOATS)
    check_shape("k", k, "B T Hk D")
    (B, T, Hk, D), U = k.shape, out.shape[1] if out.ndim > 1 else 0
    check_dtype("out", out, k.dtype)
    check_shape("out", out, "B U Hk width", B=B, Hk=Hk, width=units.width(D))
    if units.rows(T) > U:
        raise ValueError(f"`out`: expected at least {units.rows(T)} rows, got {U}")
    if k.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("`k`, `out`: expected their last dimension contiguous")
    _pool_last_keys(
        k.detach(), out, units.kind, units.stride, units.window, last, in_a_row(leftpad)
    )
