"""Start the attention kernels: a launch for each band of the mask, and one for dense rows."""

from __future__ import annotations

from typing import Any

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
from bitnet_triton.kernels.flash_attention.prepare import Prepared, TokenList, prepare_call
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import head_size, tiles


def launch_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Map q, k, v to out in the dtype of ``q`` and lse in float32."""
    prepared = prepare_call(q, k, call)
    config = row_tiles("flash_attention_fwd", q, v)
    first, *more = prepared.bands
    dtype = torch.float32 if more else q.dtype
    out, lse = _launch_band(q, k, v, call, prepared, first, dtype, config)
    if more:
        parts = [(out, lse)]
        parts += [_launch_band(q, k, v, call, prepared, band, dtype, config) for band in more]
        # the kernels write and read contiguous results
        out, lse = (t.contiguous() for t in merge_attention(*zip(*parts)))
    if prepared.rows is not None:
        band = dense_band(call.mask.causal)
        tensors = (q, k, v, out, lse)
        start_rows(_flash_attention_fwd_kernel, config, tensors, call, prepared, band, dense=True)
    return out.to(q.dtype) if more else out, lse


def _launch_band(
    q: Tensor, k: Tensor, v: Tensor, call: Call, prepared: Prepared, band: Band, dtype: torch.dtype,
    config: dict[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = results(q, v, prepared, dtype)
    start_rows(_flash_attention_fwd_kernel, config, (q, k, v, out, lse), call, prepared, band)
    return out, lse


def start_rows(
    kernel: Any, config: dict[str, int], tensors: tuple[Tensor, ...], call: Call,
    prepared: Prepared, band: Band, *, dense: bool = False, **constants: Any,
) -> None:  # fmt: skip
    """Start a kernel of which a program takes a tile of queries, over one band.

    Args:
        kernel: takes ``tensors`` and then what ``flash_attention_fwd`` does.
        config: its tiles.
        tensors: q, k, v, and the kernel's own.
        call: the settings.
        prepared: of the call.
        band: of the mask; the first one reads the listed keys as well.
        dense: the rows are those that see everything.
        **constants: of the kernel alone.
    """
    q, k, v = tensors[:3]
    H = q.shape[-2]
    batch = prepared.lengths.shape[0] if prepared.lengths is not None else q.shape[0]
    grid = (grid_tiles(q, config["BLOCK_M"], band, batch), H, 1 if prepared.packed else batch)
    launch(kernel, grid)(
        *tensors,
        heads_table(band, H, q.device), prepared.lengths,
        tokens_of(prepared.keys if band is prepared.bands[0] else None),
        None if dense else key_flags(prepared),
        tokens_of(prepared.rows if dense else None), row_flags(prepared, dense),
        *strides(q), *strides(k), *strides(v),
        sinks=call.mask.sinks if call.mask.sinks and not dense else None,
        **constants, **common(q, k, v, call, prepared, band), **config,
    )  # fmt: skip


def row_tiles(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """Return the tiles of a kernel by the size of the heads."""
    return tiles(kernel, head_size(max(q.shape[-1], v.shape[-1]), q.dtype), q.device)


def results(q: Tensor, v: Tensor, prepared: Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return memory for out and lse."""
    *lead, T, H, _ = q.shape
    if not prepared.zeroed:
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
    prepared = prepare_call(q, k, call)
    Hk = k.shape[-2]
    k, v = repeated_keys(prepared, q, k, v)
    pivot, delta = launch_delta(dout, dlse, out, lse)
    inputs = (q, k, v, dout, pivot, delta)
    dq = _launch_dq(inputs, call, prepared)
    dk, dv = _launch_dkdv(inputs, call, prepared, torch.float32 if k.shape[-2] != Hk else q.dtype)
    dk, dv = summed_keys(dk, dv, Hk)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def repeated_keys(prepared: Prepared, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of the keys for each query head, where heads share keys but not classes."""
    H, Hk = q.shape[-2], k.shape[-2]
    if not shares_keys_unevenly(prepared, H, Hk):
        return k, v
    return k.repeat_interleave(H // Hk, dim=-2), v.repeat_interleave(H // Hk, dim=-2)


def summed_keys(dk: Tensor, dv: Tensor, Hk: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``Hk`` key heads from those of ``repeated_keys``."""
    H = dk.shape[-2]
    if Hk == H:
        return dk, dv
    dk, dv = (t.unflatten(-2, (Hk, H // Hk)).sum(-2, dtype=torch.float32) for t in (dk, dv))
    return dk, dv


def shares_keys_unevenly(prepared: Prepared, H: int, Hk: int) -> bool:
    """Tell whether query heads of one key head differ in the step of a band."""
    return any(
        len({step for step, *_ in band.heads[i : i + H // Hk]}) > 1
        for band in prepared.bands
        for i in range(0, len(band.heads), H // Hk)
    )


def launch_delta(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the other kernels need of each row: pivot and delta, [B H Tq]."""
    *lead, T, H, DV = out.shape
    pivot, delta = torch.empty_like(lse), torch.empty_like(lse)
    config = tiles("flash_attention_bwd_delta", DV, out.device)
    grid = (cdiv(T, config["BLOCK_M"]), H, lead[0] if lead else 1)
    launch(_flash_attention_bwd_delta_kernel, grid)(
        out, dout, lse, dlse, pivot, delta, T, H, DV=DV, **config
    )
    return pivot, delta


def _launch_dq(inputs: tuple[Tensor, ...], call: Call, prepared: Prepared) -> Tensor:
    q, _, v = inputs[:3]
    make = torch.zeros if prepared.zeroed else torch.empty
    dtype = torch.float32 if len(prepared.bands) > 1 else q.dtype
    dq = make(q.shape, dtype=dtype, device=q.device)
    config = row_tiles("flash_attention_bwd_dq", q, v)
    kernel, tensors = _flash_attention_bwd_dq_kernel, (*inputs, dq)
    for number, band in enumerate(prepared.bands):
        start_rows(kernel, config, tensors, call, prepared, band, ACCUMULATE=number > 0)
    if prepared.rows is not None:
        band = dense_band(call.mask.causal)
        start_rows(kernel, config, tensors, call, prepared, band, dense=True, ACCUMULATE=False)
    return dq


def _launch_dkdv(
    inputs: tuple[Tensor, ...], call: Call, prepared: Prepared, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _, k, v = inputs[:3]
    passes = key_passes(call, prepared)
    make = torch.zeros if prepared.zeroed else torch.empty
    # what several launches add up is rounded once, at the end
    dtype = torch.float32 if len(passes) > 1 else dtype
    dk, dv = (make(t.shape, dtype=dtype, device=k.device) for t in (k, v))
    for number, one in enumerate(passes):
        name = "flash_attention_bwd_dkdv" + ("" if one[1] is one[2] is None else "_listed")
        start_keys(
            _flash_attention_bwd_dkdv_kernel, row_tiles(name, k, v), (*inputs, dk, dv), call,
            prepared, *one, ACCUMULATE=number > 0,
        )  # fmt: skip
    return dk, dv


KeyPass = tuple[Band, TokenList | None, TokenList | None]


def key_passes(call: Call, prepared: Prepared) -> list[KeyPass]:
    """Return the launches that add up dk and dv: bands, listed keys, listed rows."""
    passes: list[KeyPass] = [(band, None, None) for band in prepared.bands]
    dense = dense_band(call.mask.causal)
    if prepared.keys is not None:
        passes.append((dense, prepared.keys, None))
    if prepared.rows is not None:
        passes.append((dense, None, prepared.rows))
    return passes


def start_keys(
    kernel: Any, config: dict[str, int], tensors: tuple[Tensor, ...], call: Call,
    prepared: Prepared, band: Band, keys: TokenList | None, rows: TokenList | None,
    **constants: Any,
) -> None:  # fmt: skip
    """Start a kernel of which a program takes a tile of keys, for one of ``key_passes``."""
    q, k, v = tensors[:3]
    batch = prepared.lengths.shape[0] if prepared.lengths is not None else q.shape[0]
    whole = keys is None and rows is None
    grid = (
        grid_tiles(k, config["BLOCK_N"], band, batch), k.shape[-2], 1 if prepared.packed else batch
    )  # fmt: skip
    launch(kernel, grid)(
        *tensors,
        heads_table(band, q.shape[-2], q.device), prepared.lengths,
        tokens_of(keys), key_flags(prepared) if whole else None,
        tokens_of(rows), row_flags(prepared, rows is not None),
        *strides(q), *strides(k), *strides(v),
        sinks=call.mask.sinks if call.mask.sinks and whole else None,
        **constants, **common(q, k, v, call, prepared, band), **config,
    )  # fmt: skip
