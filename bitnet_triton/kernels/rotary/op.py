"""The public rotary embeddings: one that is differentiable, and one that fills the cache."""

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
from bitnet_triton.kernels.rotary.reference import (
    rotary_backward_reference,
    rotary_reference,
    store_reference,
    token_rows,
)
from bitnet_triton.runtime import (
    Implementation,
    register_op,
    remember_backend,
    remembered_backend,
    select,
)


def _triton_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.rotary.forward import launch_rotary

    return launch_rotary(x, cos, sin, backward)


def _reference_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return (rotary_backward_reference if backward else rotary_reference)(x, cos, sin)


def _triton_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    from bitnet_triton.kernels.rotary.decode import launch_rotary_and_store

    return launch_rotary_and_store(qkv, cos, sin, k_cache, v_cache, slots, positions)


def _reference_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    if positions is not None:
        cos, sin = (token_rows(table, positions, qkv.shape[1]) for table in (cos, sin))
    Hk = k_cache.shape[2]
    q, k, v = qkv.split([qkv.shape[2] - 2 * Hk, Hk, Hk], dim=2)
    store_reference(k_cache, rotary_reference(k, cos, sin), slots)
    store_reference(v_cache, v, slots)
    return rotary_reference(q, cos, sin)


ROTARY = {
    "triton": Implementation(_triton_rotary),
    "reference": Implementation(_reference_rotary),
}
ROTARY_AND_STORE = {
    "triton": Implementation(_triton_store),
    "reference": Implementation(_reference_store),
}


def _launch_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    if x.numel() == 0:
        return _fake_rotary(x, cos, sin, backward)
    run = select("rotary", ROTARY, x.device)
    return run(*map(_close, (x, cos, sin)), backward)


def _fake_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape)


def _launch_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    if qkv.numel() == 0:
        return _fake_store(qkv, cos, sin, k_cache, v_cache, slots, positions)
    run = select("rotary_and_store", ROTARY_AND_STORE, qkv.device)
    positions = None if positions is None else positions.contiguous()
    return run(*map(_close, (qkv, cos, sin)), k_cache, v_cache, slots.contiguous(), positions)


def _fake_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    B, T, heads, D = qkv.shape
    return qkv.new_empty((B, T, heads - 2 * k_cache.shape[2], D))


def _close(x: Tensor) -> Tensor:
    """Return ``x`` with neighbours along the last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
        return _rotary(x, cos, sin, backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, cos, sin, ctx.turned_back = inputs
        ctx.save_for_backward(cos, sin)
        remember_backend(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        with remembered_backend(ctx):
            dx = _rotary(dy, *ctx.saved_tensors, not ctx.turned_back)
        return dx, None, None, None


_rotary = register_op("rotary", _launch_rotary, _fake_rotary, function=_Rotary)
# what layers that have checked their arguments call
rotary_and_store_heads = register_op(
    "rotary_and_store", _launch_store, _fake_store, mutates_args=("k_cache", "v_cache")
)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of each head by the angles of its token: rotary position embedding.

    ``y = x cos + rotate_half(x) sin`` (arXiv:2104.09864, eq. 34, pairs half a head apart), with
    the products and the sum rounded to the dtype of ``x``, as in transformers' Llama and BitNet.

    Args:
        x: [B, T, H, D] float16, bfloat16 or float32, D even; queries or keys.
        cos: [B or 1, T, D], in the dtype and on the device of ``x``.
        sin: likewise.

    Returns:
        [B, T, H, D] in the dtype of ``x``; differentiable in ``x``.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, D is odd, a tensor is on another device, or ``cos`` or
            ``sin`` requires a gradient, which they do not get.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    check_shape("x", x, "B T H D")
    B, T, _, D = x.shape
    _check_even(D, "x")
    for name, rows in (("cos", cos), ("sin", sin)):
        _check_rows(name, rows, x, B, T)
        if rows.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"`{name}`: expected a tensor without gradient; detach it")
    return (_Rotary.apply if wants_gradient(x) else _rotary)(x, cos, sin, False)


def rotary_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys as ``apply_rotary``, and write keys and values to the cache.

    For inference, not differentiable. Where a token goes and by what it is turned is read on the
    device: a launch recorded once (a CUDA graph) serves every decode step. Token t of row b goes
    to slot ``slots[b] + t``; one whose slot lies outside of the cache is not stored.

    Args:
        qkv: [B, T, H + 2 Hk, D] float16, bfloat16 or float32, D even: the heads of the queries,
            the keys, the values.
        cos: a table [P, D] of all positions, or the row of each token [B or 1, T, D]; in the dtype
            of ``qkv``.
        sin: likewise.
        k_cache: [B, C, Hk, D] in the dtype of ``qkv``, last dimension contiguous; changed in place.
        v_cache: likewise.
        slots: [B] int32, of the first token of each row.
        positions: [B] int32, of the first token of each row in the tables; default: ``slots``.
            They differ where padding on the left takes slots, not positions. Negative ones, of
            padding, count as 0; beyond the tables queries and keys become NaN.

    Returns:
        The rotated queries [B, T, H, D].

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, D is odd, a tensor is on another device, the last dimension
            of a cache is not contiguous, or there are ``positions`` without tables.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("qkv", qkv)
    check_dtype("qkv", qkv, *FLOATS)
    check_shape("qkv", qkv, "B T heads D")
    B, _, heads, D = qkv.shape
    _check_even(D, "qkv")
    _check_caches(k_cache, v_cache, qkv)
    if heads <= 2 * k_cache.shape[2]:
        raise ValueError(
            f"`qkv`: expected [B T H+2*Hk D] with H at least 1, Hk={k_cache.shape[2]}, "
            f"got {list(qkv.shape)}"
        )
    _check_angles(cos, sin, qkv, positions)
    for name, places in (("slots", slots), ("positions", positions)):
        if places is not None:
            _check_like(name, places, qkv, torch.int32)
            check_shape(name, places, "B", B=B)
    if cos.ndim == 2 and positions is None:
        positions = slots
    qkv, cos, sin, k_cache, v_cache = (t.detach() for t in (qkv, cos, sin, k_cache, v_cache))
    return rotary_and_store_heads(qkv, cos, sin, k_cache, v_cache, slots, positions)


def _check_even(D: int, name: str) -> None:
    if D == 0 or D % 2:
        raise ValueError(f"`{name}`: expected heads of an even size D, got {D}")


def _check_like(name: str, value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> None:
    check_tensor(name, value)
    check_dtype(name, value, dtype or like.dtype)
    check_device(name, value, like.device)


def _check_rows(name: str, rows: Tensor, x: Tensor, B: int, T: int) -> None:
    _check_like(name, rows, x)
    if rows.ndim != 3 or rows.shape[0] not in (1, B) or rows.shape[1:] != (T, x.shape[-1]):
        wanted = f"[B or 1, T, D] with B={B}, T={T}, D={x.shape[-1]}"
        raise ValueError(f"`{name}`: expected {wanted}, got {list(rows.shape)}")


def _check_angles(cos: Tensor, sin: Tensor, qkv: Tensor, positions: Tensor | None) -> None:
    check_tensor("cos", cos)
    if cos.ndim != 2:
        if positions is not None:
            raise ValueError(f"`cos`: expected a table [P D] with `positions`, got {cos.ndim}-d")
        B, T = qkv.shape[:2]
        for name, rows in (("cos", cos), ("sin", sin)):
            _check_rows(name, rows, qkv, B, T)
        return
    for name, table in (("cos", cos), ("sin", sin)):
        _check_like(name, table, qkv)
        check_shape(name, table, "P D", P=cos.shape[0], D=qkv.shape[-1])
    if cos.shape[0] == 0:
        raise ValueError("`cos`: expected a table of at least one position")


def _check_caches(k_cache: Tensor, v_cache: Tensor, qkv: Tensor) -> None:
    sizes = {"B": qkv.shape[0], "D": qkv.shape[-1]}
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_like(name, cache, qkv)
        check_shape(name, cache, "B C Hk D", **sizes)
        if cache.shape[2] == 0:
            raise ValueError(f"`{name}`: expected at least one head, got {list(cache.shape)}")
        if cache.stride(-1) != 1:
            raise ValueError(f"`{name}`: expected its last dimension contiguous")
        sizes |= {"C": cache.shape[1], "Hk": cache.shape[2]}
