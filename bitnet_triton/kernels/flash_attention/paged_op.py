"""Attention over pages as a registered op: its reference, and the choice of a backend."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launchers import (
    inner_contiguous,
    positive_scale,
    triton_objection,
)
from bitnet_triton.kernels.flash_attention.paged_call import PagedCall, page_tile
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.device import smallest_dot


def gather_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Return the first ``length`` rows [length, Hk, D] of the pages that ``table`` [N] lists."""
    page_size = pages.shape[1]
    used = table[: -(-length // page_size)].long()
    return pages[used].flatten(0, 1)[:length]


def paged_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, call: PagedCall
) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of each sequence, then attend to them densely.

    Returns:
        out and lse, both in the dtype of ``q``.
    """
    packed = call.cu_seqlens_q is not None
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), float("-inf"))
    starts = call.cu_seqlens_q.tolist() if call.cu_seqlens_q is not None else []
    for b, length in enumerate(call.seqused_k.tolist()):
        keys, values = (gather_pages(t, call.block_table[b], length)[None] for t in (k, v))
        queries = q[None, starts[b] : starts[b + 1]] if packed else q[None, b]
        if queries.numel() == 0 or length == 0:
            continue
        part, part_lse = attention_reference(
            queries, keys, values, mask=call.mask, scale=call.scale, softcap=call.softcap
        )
        if packed:
            out[starts[b] : starts[b + 1]], lse[:, starts[b] : starts[b + 1]] = part[0], part_lse[0]
        else:
            out[b], lse[b] = part[0], part_lse[0]
    return out, lse


@functools.cache
def _triton_module() -> ModuleType:
    """Import Triton on first use."""
    from bitnet_triton.kernels.flash_attention import paged

    return paged


def _triton_fwd(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> tuple[Tensor, Tensor]:
    q, call = positive_scale(q, call)
    q, k, v = inner_contiguous(q, k, v)
    return _triton_module().launch_paged(q, k, v, call)


def _reference_fwd(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> tuple[Tensor, Tensor]:
    out, lse = paged_attention_reference(q.float(), k.float(), v.float(), call)
    return out.to(q.dtype), lse


def _objection(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> str | None:
    # a tile lies in one page: of fewer keys, more is rounded than computed
    smallest = max(smallest_dot(q.device), 4)
    if page_tile(k.shape[1]) < smallest:
        return f"pages have a multiple of {smallest} tokens, not {k.shape[1]}"
    return triton_objection(q, v, call)


PAGED_FWD = {
    "triton": Implementation(_triton_fwd, _objection),
    "reference": Implementation(_reference_fwd),
}


def _launch(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or call.block_table.numel() == 0:
        out, lse = _fake(q, k, v, call)
        return out.zero_(), lse.fill_(float("-inf"))
    return select("flash_attention_paged", PAGED_FWD, q.device, q, k, v, call)(q, k, v, call)


def _fake(q: Tensor, k: Tensor, v: Tensor, call: PagedCall) -> tuple[Tensor, Tensor]:
    *lead, Tq, H, _ = q.shape
    lse = q.new_empty((*lead, H, Tq), dtype=torch.float32)
    return q.new_empty((*lead, Tq, H, v.shape[-1])), lse


paged_attention = register_op("flash_attention_paged", _launch, _fake, bundle=PagedCall)
