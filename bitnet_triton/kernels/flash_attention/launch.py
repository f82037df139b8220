"""Start the attention kernels: a launch for each band of the mask, and one for dense rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.backward import (
    _flash_attention_bwd_delta_kernel,
    _flash_attention_bwd_dkdv_kernel,
    _flash_attention_bwd_dq_kernel,
)
from bitnet_triton.kernels.flash_attention.bands import Band, dense_band, heads_table
from bitnet_triton.kernels.flash_attention.forward import _flash_attention_fwd_kernel
from bitnet_triton.kernels.flash_attention.merge import merge_attention
from bitnet_triton.kernels.flash_attention.operands import (
    common,
    grid_tiles,
    key_flags,
    row_flags,
    strides,
    tokens_of,
)
from bitnet_triton.kernels.flash_attention.plan import Plan, TokenList, plan_call
from bitnet_triton.kernels.flash_attention.select import launch_select
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, visited: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Map q, k, v to out in the dtype of ``q`` and lse in float32."""
    plan = plan_call(q, k, call)
    cuts = launch_select(q, k, call, plan) if call.mask.selects else None
    first, *more = plan.bands
    wide = torch.float32 if more else q.dtype
    out, lse = _launch_band(q, k, v, call, plan, first, None, wide, visited, cuts, with_keys=True)
    if more:
        parts = [(out, lse)] + [
            _launch_band(q, k, v, call, plan, band, None, wide, visited, cuts, with_keys=False)
            for band in more
        ]
        # the kernels write and read contiguous results
        out, lse = (t.contiguous() for t in merge_attention(*zip(*parts)))
    if plan.rows is not None:
        band = dense_band(call.mask.causal)
        _launch_band(q, k, v, call, plan, band, (out, lse), wide, visited, cuts, with_keys=False)
    return out.to(q.dtype) if more else out, lse


def _launch_band(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: Plan, band: Band,
    results: tuple[Tensor, Tensor] | None, dtype: torch.dtype, visited: list[Tensor] | None,
    cuts: Tensor | None, *, with_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute one band; the rows that see everything are written into ``results``."""
    H = q.shape[-2]
    out, lse = results if results is not None else _results(q, v, plan, dtype)
    dense = results is not None
    config = _row_tiles("flash_attention_fwd", q, v, cuts)
    batch = plan.lengths.shape[0] if plan.lengths is not None else q.shape[0]
    programs = grid_tiles(q, config["BLOCK_M"], band, batch)
    grid = (programs, H, 1 if plan.packed else batch)
    if visited is not None:
        visited.append(torch.zeros(batch * H * programs, dtype=torch.int32, device=q.device))
    launch(_flash_attention_fwd_kernel, grid)(
        q, k, v, out, lse,
        heads_table(band, H, q.device), plan.lengths,
        *tokens_of(plan.keys if with_keys else None), None if dense else key_flags(plan),
        *tokens_of(plan.rows if dense else None), row_flags(plan, dense),
        visited[-1] if visited is not None else None, cuts,
        *strides(q), *strides(k), *strides(v),
        sinks=call.mask.sinks if call.mask.sinks and not dense else None,
        **common(q, k, v, call, plan, band),
        **config,
    )  # fmt: skip
    return out, lse


def _row_tiles(kernel: str, q: Tensor, v: Tensor, cuts: Tensor | None) -> dict[str, int]:
    kernel = kernel if cuts is None else kernel + "_selected"
    return tiles(kernel, head_size(max(q.shape[-1], v.shape[-1]), q.dtype), q.device)


def _results(q: Tensor, v: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *lead, T, H, _ = q.shape
    if not plan.zeroed:
        out = torch.empty((*lead, T, H, v.shape[-1]), dtype=dtype, device=q.device)
        return out, torch.empty((*lead, H, T), dtype=torch.float32, device=q.device)
    # rows of padding belong to no tile
    out = q.new_zeros((*lead, T, H, v.shape[-1]), dtype=dtype)
    return out, q.new_full((*lead, H, T), float("-inf"), dtype=torch.float32)


def launch_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v in their dtypes."""
    plan = plan_call(q, k, call)
    H, Hk = q.shape[-2], k.shape[-2]
    if shares_keys_unevenly(plan, H, Hk):
        # heads that share keys but not classes: a copy of the keys for each of them
        k, v = (t.repeat_interleave(H // Hk, dim=-2) for t in (k, v))
    cuts = launch_select(q, k, call, plan) if call.mask.selects else None
    pivot, delta = _launch_delta(dout, dlse, out, lse)
    dq = _launch_dq(dout, q, k, v, pivot, delta, cuts, call, plan)
    dtype = torch.float32 if k.shape[-2] != Hk else q.dtype
    dk, dv = _launch_dkdv(dout, q, k, v, pivot, delta, cuts, call, plan, dtype)
    if k.shape[-2] != Hk:
        dk, dv = (t.unflatten(-2, (Hk, H // Hk)).sum(-2, dtype=torch.float32) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def shares_keys_unevenly(plan: Plan, H: int, Hk: int) -> bool:
    """Tell whether query heads of one key head differ in the step of a band."""
    return any(
        len({step for step, *_ in band.heads[i : i + H // Hk]}) > 1
        for band in plan.bands
        for i in range(0, len(band.heads), H // Hk)
    )


def _launch_delta(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    *lead, T, H, DV = out.shape
    pivot, delta = torch.empty_like(lse), torch.empty_like(lse)
    config = tiles("flash_attention_bwd_delta", DV, out.device)
    grid = (cdiv(T, config["BLOCK_M"]), H, lead[0] if lead else 1)
    launch(_flash_attention_bwd_delta_kernel, grid)(
        out, dout, lse, dlse, pivot, delta, T, H, DV=DV, **config
    )
    return pivot, delta


def _launch_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pivot: Tensor, delta: Tensor,
    cuts: Tensor | None, call: Call, plan: Plan,
) -> Tensor:  # fmt: skip
    H = q.shape[-2]
    several = len(plan.bands) > 1
    make = torch.zeros if plan.zeroed else torch.empty
    dq = make(q.shape, dtype=torch.float32 if several else q.dtype, device=q.device)
    config = _row_tiles("flash_attention_bwd_dq", q, v, cuts)
    batch = plan.lengths.shape[0] if plan.lengths is not None else q.shape[0]
    passes = [(band, number > 0, False) for number, band in enumerate(plan.bands)]
    if plan.rows is not None:
        passes.append((dense_band(call.mask.causal), False, True))
    for band, accumulate, dense in passes:
        programs = grid_tiles(q, config["BLOCK_M"], band, batch)
        keys = plan.keys if band is plan.bands[0] else None
        launch(_flash_attention_bwd_dq_kernel, (programs, H, 1 if plan.packed else batch))(
            q, k, v, dout, pivot, delta, cuts, dq,
            heads_table(band, H, q.device), plan.lengths,
            *tokens_of(keys), None if dense else key_flags(plan),
            *tokens_of(plan.rows if dense else None), row_flags(plan, dense),
            *strides(q), *strides(k), *strides(v),
            sinks=call.mask.sinks if call.mask.sinks and not dense else None,
            ACCUMULATE=accumulate,
            **common(q, k, v, call, plan, band),
            **config,
        )  # fmt: skip
    return dq


def _launch_dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pivot: Tensor, delta: Tensor,
    cuts: Tensor | None, call: Call, plan: Plan, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *_, H, D = q.shape
    Hk = k.shape[-2]
    Pass = tuple[Band, TokenList | None, TokenList | None]
    passes: list[Pass] = [(band, None, None) for band in plan.bands]
    dense = dense_band(call.mask.causal)
    if plan.keys is not None:
        passes.append((dense, plan.keys, None))
    if plan.rows is not None:
        passes.append((dense, None, plan.rows))
    make = torch.zeros if plan.zeroed else torch.empty
    # what several launches add up is rounded once, at the end
    dtype = torch.float32 if len(passes) > 1 else dtype
    dk, dv = (make(t.shape, dtype=dtype, device=k.device) for t in (k, v))
    batch = plan.lengths.shape[0] if plan.lengths is not None else q.shape[0]
    for number, (band, keys, rows) in enumerate(passes):
        whole = keys is None and rows is None
        kernel = "flash_attention_bwd_dkdv" + ("" if whole and cuts is None else "_listed")
        config = tiles(kernel, head_size(max(D, v.shape[-1]), q.dtype), q.device)
        programs = grid_tiles(k, config["BLOCK_N"], band, batch)
        launch(_flash_attention_bwd_dkdv_kernel, (programs, Hk, 1 if plan.packed else batch))(
            q, k, v, dout, pivot, delta, cuts, dk, dv,
            heads_table(band, H, q.device), plan.lengths,
            *tokens_of(keys), key_flags(plan) if whole else None,
            *tokens_of(rows), row_flags(plan, rows is not None),
            *strides(q), *strides(k), *strides(v),
            sinks=call.mask.sinks if call.mask.sinks and whole else None,
            ACCUMULATE=number > 0,
            **common(q, k, v, call, plan, band),
            **config,
        )  # fmt: skip
    return dk, dv
