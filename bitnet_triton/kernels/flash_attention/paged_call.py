"""A call of attention over pages: its arguments, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.quantize.op import FLOATS

_NONE = -1  # stands for None in a list of integers

Flat = tuple[list[Tensor], Tensor | None, list[int], list[float]]


@dataclass(frozen=True)
class PagedCall:
    """Everything but q, k and v.

    Attributes:
        mask: causal or not, a window, sinks.
        scale: multiplies the scores.
        softcap: bounds the scores; None: does not.
        block_table: int32 [B N], the pages of each sequence in order.
        seqused_k: int32 [B], keys of each sequence.
        cu_seqlens_q: int32 [B + 1], where packed queries of a sequence start; None: not packed.
    """

    mask: Mask
    scale: float
    softcap: float | None
    block_table: Tensor
    seqused_k: Tensor
    cu_seqlens_q: Tensor | None = None

    @classmethod
    def build(
        cls,
        tables: list[Tensor],
        cu_seqlens_q: Tensor | None,
        numbers: list[int],
        factors: list[float],
    ) -> PagedCall:
        """Put together what ``flatten`` took apart."""
        causal, window, right, sinks = (None if n == _NONE else n for n in numbers)
        mask = Mask(causal=bool(causal), window=window, window_right=right, sinks=sinks or 0)
        scale, softcap = factors
        block_table, seqused_k = tables
        return cls(mask, scale, softcap or None, block_table, seqused_k, cu_seqlens_q)

    def flatten(self) -> Flat:
        """Take it apart into the arguments of ``build``."""
        mask = self.mask
        numbers = [int(mask.causal), mask.window, mask.window_right, mask.sinks]
        return (
            [self.block_table, self.seqused_k],
            self.cu_seqlens_q,
            [_NONE if n is None else n for n in numbers],
            [self.scale, self.softcap or 0.0],
        )


def page_tile(page_size: int) -> int:
    """Return the most keys, a power of two, that a tile has which lies in one page."""
    return page_size & -page_size


def refuse_lengths(**lengths: Tensor | None) -> None:
    """Raise ``ValueError`` where a call over pages has lengths that it does not take."""
    for name, value in lengths.items():
        if value is not None:
            raise ValueError(f"`{name}`: not with `block_table`, see `seqused_k`, `cu_seqlens_q`")


def checked_paged_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
    block_table: Tensor, page_size: int | None, cu_seqlens_q: Tensor | None,
    seqused_k: Tensor | None,
) -> PagedCall:  # fmt: skip
    """Return the arguments of ``flash_attention`` over pages as a call; raise what is wrong."""
    if not _fit(q, k, v, block_table, cu_seqlens_q, seqused_k):
        _explain(q, k, v, block_table, cu_seqlens_q, seqused_k)
    assert seqused_k is not None
    if page_size is not None and page_size != k.shape[1]:
        raise ValueError(f"`page_size`: `k` has pages of {k.shape[1]} tokens, got {page_size}")
    if not isinstance(mask, Mask):
        raise TypeError(f"`mask`: expected a Mask, got {type(mask).__name__}")
    for field in ("pattern", "global_tokens", "dense_from"):
        if getattr(mask, field) is not None:
            raise ValueError(f"`mask`: attention over pages has no `{field}`")
    if mask.dilation != 1 and mask.dilations != (1,):
        raise ValueError("`mask`: attention over pages has no `dilation`")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap`: expected a positive number, got {softcap}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return PagedCall(mask, scale, softcap, block_table, seqused_k, cu_seqlens_q)


def _fit(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor | None, used: Tensor | None
) -> bool:
    """Tell at a glance whether ``_explain`` has nothing to say: most calls are right."""
    if not type(q) is type(k) is type(v) is type(table) is type(used) is Tensor:
        return False
    if not q.dtype == k.dtype == v.dtype or not table.dtype == used.dtype == torch.int32:
        return False
    a, b, c, n = q.shape, k.shape, v.shape, table.shape
    if len(a) != (3 if starts is not None else 4) or not len(b) == len(c) == 4 or len(n) != 2:
        return False
    if starts is None:
        B = a[0]
    elif type(starts) is Tensor and starts.dtype == torch.int32 and starts.ndim == 1:
        B = starts.shape[0] - 1
    else:
        return False
    return (
        q.dtype in FLOATS
        and q.device == k.device == v.device == table.device == used.device
        and (starts is None or starts.device == q.device)
        and used.shape == (B,)
        and n[0] == B
        and b[:3] == c[:3]
        and b[1] > 0
        and b[2] > 0
        and a[-2] % b[2] == 0
        and a[-1] == b[3] > 0
        and c[3] > 0
    )


def _explain(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor | None, used: Tensor | None
) -> None:
    """Raise what is wrong with the tensors, by name, if anything is."""
    _check_tensors(q, k, v, packed=starts is not None)
    if used is None:
        raise ValueError("`seqused_k`: a block table needs the number of keys of each sequence")
    B = q.shape[0] if starts is None else starts.numel() - 1
    for name, value, dims in (
        ("block_table", table, "B N"), ("seqused_k", used, "B"), ("cu_seqlens_q", starts, "B+1")
    ):  # fmt: skip
        if value is not None:
            check_tensor(name, value)
            check_dtype(name, value, torch.int32)
            check_shape(name, value, dims, **{"B": B, "B+1": B + 1})
            check_device(name, value, q.device)
    if B < 0:
        raise ValueError("`cu_seqlens_q`: expected [B+1] with B at least 0, got [0]")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    check_shape("q", q, "R H D" if packed else "B Tq H D")
    H, D = q.shape[-2:]
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value)
        check_dtype(name, value, q.dtype)
        check_device(name, value, q.device)
    check_shape("k", k, "P page Hk D", D=D)
    P, page, Hk, _ = k.shape
    check_shape("v", v, "P page Hk Dv", P=P, page=page, Hk=Hk)
    if Hk == 0 or H % Hk:
        raise ValueError(f"`k`: expected heads that divide the {H} of `q`, got {Hk}")
    if D == 0 or v.shape[-1] == 0 or page == 0:
        raise ValueError("`q`, `k`, `v`: expected heads of at least one value, pages of one token")
