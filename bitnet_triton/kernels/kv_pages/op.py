"""The public ops of pages: checks, and the choice of a backend."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.kv_pages.reference import copy_pages_reference, write_pages_reference
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import Implementation, register_op, select

INTEGERS = (torch.int64, torch.int32)


@cache
def _triton_module() -> ModuleType:
    """Import Triton on first use."""
    from bitnet_triton.kernels.kv_pages import forward

    return forward


def _triton_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    _triton_module().launch_write_pages(k_pages, v_pages, k, v, slots.contiguous())


def _triton_copy(pages: Tensor, pairs: Tensor) -> None:
    _triton_module().launch_copy_pages(pages, pairs.contiguous())


WRITE_PAGES = {
    "triton": Implementation(_triton_write),
    "reference": Implementation(write_pages_reference),
}
COPY_PAGES = {
    "triton": Implementation(_triton_copy),
    "reference": Implementation(copy_pages_reference),
}


def _launch_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    if k.numel() and k_pages.numel():
        select("write_pages", WRITE_PAGES, k.device)(k_pages, v_pages, k, v, slots)


def _fake_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    return None


def _launch_copy(pages: Tensor, pairs: Tensor) -> None:
    if pages.numel() and pairs.numel():
        select("copy_pages", COPY_PAGES, pages.device)(pages, pairs)


def _fake_copy(pages: Tensor, pairs: Tensor) -> None:
    return None


_write_pages = register_op(
    "write_pages", _launch_write, _fake_write, mutates_args=("k_pages", "v_pages")
)
_copy_pages = register_op("copy_pages", _launch_copy, _fake_copy, mutates_args=("pages",))


def write_pages(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write tokens to their places in pages.

    Slot ``page * page_size + place`` is a token's; tokens whose slot lies outside of the pages (-1:
    padding) are not written. Two tokens of one slot leave either of them. For inference, not
    differentiable.

    Args:
        k_pages: [P page_size Hk D] in the dtype of ``k``, last dimension contiguous; changed in
            place.
        v_pages: [P page_size Hk Dv], likewise.
        k: [T Hk D] float16, bfloat16 or float32.
        v: [T Hk Dv] in the dtype of ``k``.
        slots: [T] int64 or int32.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a tensor is on another device, or heads of pages are not
            contiguous.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("k", k)
    check_dtype("k", k, *FLOATS)
    check_shape("k", k, "T Hk D")
    T, Hk, D = k.shape
    check_tensor("v", v)
    check_shape("v", v, "T Hk Dv", T=T, Hk=Hk)
    check_tensor("k_pages", k_pages)
    check_shape("k_pages", k_pages, "P page Hk D", Hk=Hk, D=D)
    P, page = k_pages.shape[:2]
    check_shape("v_pages", v_pages, "P page Hk Dv", P=P, page=page, Hk=Hk, Dv=v.shape[2])
    for name, value in (("v", v), ("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype(name, value, k.dtype)
        check_device(name, value, k.device)
    for name, value in (("k_pages", k_pages), ("v_pages", v_pages)):
        if value.stride(-1) != 1:
            raise ValueError(f"`{name}`: expected heads that are contiguous")
    check_tensor("slots", slots)
    check_dtype("slots", slots, *INTEGERS)
    check_shape("slots", slots, "T", T=T)
    check_device("slots", slots, k.device)
    _write_pages(k_pages, v_pages, k.detach(), v.detach(), slots)


def copy_pages(pages: Tensor, pairs: Tensor) -> None:
    """Copy whole pages: what a write to a page with another owner does first.

    Pairs that name a page outside of the memory are passed over. No page may be both copied from
    and copied to.

    Args:
        pages: [P ...] of any dtype, each page contiguous; changed in place.
        pairs: [N 2] int64 or int32, from and to.

    Raises:
        TypeError: ``pairs`` has a wrong dtype.
        ValueError: shapes do not fit, ``pairs`` is on another device, or pages are not contiguous.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tensor("pages", pages)
    if pages.ndim < 2:
        raise ValueError(f"`pages`: expected [P ...], got {list(pages.shape)}")
    if pages.shape[0] and not pages[0].is_contiguous():
        raise ValueError("`pages`: expected pages that are contiguous")
    check_tensor("pairs", pairs)
    check_dtype("pairs", pairs, *INTEGERS)
    check_shape("pairs", pairs, "N 2", **{"2": 2})
    check_device("pairs", pairs, pages.device)
    _copy_pages(pages, pairs)
