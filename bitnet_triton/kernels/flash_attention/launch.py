"""Start the attention kernels: a launch for each band of the mask, and one for dense rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.backward import (
    _flash_attention_bwd_delta_kernel,
    _flash_attention_bwd_dkdv_kernel,
    _flash_attention_bwd_dq_kernel,
)
from bitnet_triton.kernels.flash_attention.bands import (
    Band,
    Plan,
    TokenList,
    dense_band,
    heads_table,
    plan_call,
)
from bitnet_triton.kernels.flash_attention.forward import (
    _flash_attention_fwd_kernel,
    score_factors,
)
from bitnet_triton.kernels.flash_attention.merge import merge_attention
from bitnet_triton.runtime import launch
from bitnet_triton.runtime.autotune import head_size, tiles


def strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of sequences (0 where packed), rows and heads."""
    return (0, *t.stride()[:2]) if t.ndim == 3 else t.stride()[:3]  # type: ignore[return-value]


def grid_tiles(t: Tensor, block: int, band: Band, batch: int) -> int:
    """Return the programs that all tiles of rows of ``t`` need, without asking for lengths."""
    steps = {step for step, *_ in band.heads}
    if t.ndim == 4:
        return max(step * triton.cdiv(triton.cdiv(t.shape[1], step), block) for step in steps)
    # each class of each sequence may end in a tile of its own
    return triton.cdiv(t.shape[0], block) + batch * max(steps)


def common(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: Plan, band: Band) -> dict[str, Any]:
    """Return the keyword arguments that all kernels take."""
    H, Hk = q.shape[-2], k.shape[-2]
    packed = plan.packed
    scale_log2, softcap_log2 = score_factors(call.scale, call.softcap)
    return {
        "B": plan.lengths.shape[0] if packed and plan.lengths is not None else None,
        "Tq": q.shape[-3], "Tk": k.shape[-3],
        "block": band.block, "summary": band.summary,
        "scale_log2": scale_log2, "softcap_log2": softcap_log2,
        "GROUP": H // Hk, "D": q.shape[-1], "DV": v.shape[-1],
        "KIND": band.kind, "DILATED": band.is_dilated, "CAUSAL": call.mask.causal,
    }  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, visited: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Map q, k, v to out in the dtype of ``q`` and lse in float32."""
    plan = plan_call(q, k, call)
    wide = torch.float32 if len(plan.bands) > 1 else q.dtype
    parts = [
        _launch_band(q, k, v, call, plan, band, None, wide, visited, with_keys=number == 0)
        for number, band in enumerate(plan.bands)
    ]
    # the kernels write and read contiguous results
    out, lse = (t.contiguous() for t in _merged(parts))
    if plan.rows is not None:
        band = dense_band(call.mask.causal)
        _launch_band(q, k, v, call, plan, band, (out, lse), wide, visited, with_keys=False)
    return out.to(q.dtype), lse


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return parts[0] if len(parts) == 1 else merge_attention(*zip(*parts))


def _launch_band(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: Plan, band: Band,
    results: tuple[Tensor, Tensor] | None, dtype: torch.dtype, visited: list[Tensor] | None,
    *, with_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute one band; the rows that see everything are written into ``results``."""
    H, D = q.shape[-2:]
    out, lse = results if results is not None else _results(q, v, plan, dtype)
    dense = results is not None
    config = tiles("flash_attention_fwd", head_size(max(D, v.shape[-1]), q.dtype), q.device)
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
        visited[-1] if visited is not None else None,
        *strides(q), *strides(k), *strides(v),
        sinks=call.mask.sinks if call.mask.sinks and not dense else None,
        **common(q, k, v, call, plan, band),
        **config,
    )  # fmt: skip
    return out, lse


def _results(q: Tensor, v: Tensor, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *lead, T, H, _ = q.shape
    if not plan.zeroed:
        out = q.new_empty((*lead, T, H, v.shape[-1]), dtype=dtype)
        return out, q.new_empty((*lead, H, T), dtype=torch.float32)
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
    delta = _launch_delta(dout, dlse, out, lse)
    dq = _launch_dq(dout, q, k, v, lse, delta, call, plan)
    dtype = torch.float32 if k.shape[-2] != Hk else q.dtype
    dk, dv = _launch_dkdv(dout, q, k, v, lse, delta, call, plan, dtype)
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


def _launch_delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    *lead, T, H, DV = out.shape
    delta = torch.empty_like(lse)
    config = tiles("flash_attention_bwd_delta", DV, out.device)
    grid = (triton.cdiv(T, config["BLOCK_M"]), H, lead[0] if lead else 1)
    launch(_flash_attention_bwd_delta_kernel, grid)(
        out, dout, lse, dlse, delta, T, H, DV=DV, **config
    )
    return delta


def _launch_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call,
    plan: Plan,
) -> Tensor:  # fmt: skip
    H, D = q.shape[-2:]
    several = len(plan.bands) > 1
    make = torch.zeros if plan.zeroed else torch.empty
    dq = make(q.shape, dtype=torch.float32 if several else q.dtype, device=q.device)
    config = tiles("flash_attention_bwd_dq", head_size(max(D, v.shape[-1]), q.dtype), q.device)
    batch = plan.lengths.shape[0] if plan.lengths is not None else q.shape[0]
    passes = [(band, number > 0, False) for number, band in enumerate(plan.bands)]
    if plan.rows is not None:
        passes.append((dense_band(call.mask.causal), False, True))
    for band, accumulate, dense in passes:
        programs = grid_tiles(q, config["BLOCK_M"], band, batch)
        keys = plan.keys if band is plan.bands[0] else None
        launch(_flash_attention_bwd_dq_kernel, (programs, H, 1 if plan.packed else batch))(
            q, k, v, dout, lse, delta, dq,
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
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call,
    plan: Plan, dtype: torch.dtype,
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
    config = tiles("flash_attention_bwd_dkdv", head_size(max(D, v.shape[-1]), q.dtype), q.device)
    batch = plan.lengths.shape[0] if plan.lengths is not None else q.shape[0]
    for number, (band, keys, rows) in enumerate(passes):
        programs = grid_tiles(k, config["BLOCK_N"], band, batch)
        whole = keys is None and rows is None
        launch(_flash_attention_bwd_dkdv_kernel, (programs, Hk, 1 if plan.packed else batch))(
            q, k, v, dout, lse, delta, dk, dv,
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


def tokens_of(listed: TokenList | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a list of tokens and where sequences start in it, as kernels take them."""
    return (None, None) if listed is None else (listed.tokens, listed.starts)


def key_flags(plan: Plan) -> Tensor | None:
    """Return the flags of keys to leave out; the first ``sinks`` are left out by their number."""
    return plan.keys.flags if plan.keys is not None and plan.flagged else None


def row_flags(plan: Plan, dense: bool) -> Tensor | None:
    """Return the flags of rows to leave out, where they are not the ones to compute."""
    return plan.rows.flags if plan.rows is not None and not dense else None
