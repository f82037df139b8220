"""Start the kernels of compressed attention and of the choice of blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launch import launch_delta
from bitnet_triton.kernels.flash_attention.operands import strides
from bitnet_triton.kernels.native_sparse.arguments import Results, SparseCall, empty_results
from bitnet_triton.kernels.native_sparse.backward import (
    _compressed_attention_bwd_dkdv_kernel,
    _compressed_attention_bwd_dq_kernel,
)
from bitnet_triton.kernels.native_sparse.forward import _compressed_attention_fwd_kernel
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import Tiles, head_size, tiles
from bitnet_triton.runtime.device import smallest_dot

# heads of float32 on a GPU that attend and choose in one pass
_WIDEST_FLOAT32 = 64
# the smallest tile of rows
_FEW_ROWS = 16
# programs that go through all tiles, for each thread of a CPU and each multiprocessor of a GPU
_PROGRAMS_A_THREAD, _PROGRAMS_A_MULTIPROCESSOR, _MULTIPROCESSORS = 4, 4, 132


def launch_forward(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Results:
    """Map q, k, v to out in the dtype of ``q``, lse in float32, and indices in int32."""
    if call.attend and call.select and _needs_two_passes(q, v):
        out, lse, _ = _launch_forward(q, k, v, replace(call, select=False))
        only = replace(call, attend=False, keeps_lse=False)
        return out, lse, _launch_forward(q, k, v, only)[2]
    return _launch_forward(q, k, v, call)


def _needs_two_passes(q: Tensor, v: Tensor) -> bool:
    """Tell whether attention and choice together have no room in the registers of a GPU."""
    is_wide = max(q.shape[-1], v.shape[-1]) > _WIDEST_FLOAT32
    return q.dtype == torch.float32 and smallest_dot(q.device) > 1 and is_wide


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Results:
    out, lse, indices = empty_results(q, k, v, call)
    rows = call.rows(q)
    if call.leftpad is not None:
        out.zero_()
        lse.fill_(float("-inf"))
        indices.fill_(-1)
    config = _row_tiles("compressed_attention_fwd" + ("" if call.attend else "_choice"), q, v)
    blocks, (B, Tq), Hk = call.blocks, _sizes(q), k.shape[-2]
    M, lines = config["BLOCK_M"], triton.next_power_of_2(blocks.ratio)
    config["ROWS"] = min(config["ROWS"], M)
    width = config["BLOCK_N"] // lines
    items = _tiles_of(q, call, M) * Hk * B
    room = cdiv(cdiv(call.tokens, blocks.selection) + 1, width) * width
    programs = min(items, _programs(q.device)) if call.select else items
    G, dtype = q.shape[-2] // Hk, torch.float32
    shapes = ((G, 2, M, room), (G, room // width + 1, M), (M, room))
    sums, pivots, ranks = (
        torch.empty((programs, *shape) if call.select else 0, dtype=kind, device=q.device)
        for shape, kind in zip(shapes, (dtype, dtype, torch.int64))
    )
    launch(_compressed_attention_fwd_kernel, (programs,))(
        q, k, v, out, lse if call.keeps_lse else None, indices, sums, pivots, ranks, rows,
        *strides(q), *strides(k), *strides(v),
        _packed(call), Tq, Hk, B, items, room, call.tokens - Tq, blocks.initial, blocks.local,
        call.scale * math.log2(math.e),
        SELECTION=blocks.selection, SELECTED=blocks.selected, ATTEND=call.attend,
        SELECT=call.select, LINES=lines, **_constants(q, k, v, call), **config,
    )  # fmt: skip
    return out, lse, indices


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: SparseCall
) -> Results:
    """Return the gradients of q, k and v in their dtypes."""
    rows, (B, Tq), (H, Hk) = call.rows(q), _sizes(q), (q.shape[-2], k.shape[-2])
    pivot, delta = launch_delta(dout, None, out, lse)
    inputs, factor = (q, k, v, dout, pivot, delta), call.scale * math.log2(math.e)
    sizes = (*strides(q), *strides(k), *strides(v), _packed(call), Tq)
    before, constants = call.tokens - Tq, _constants(q, k, v, call)

    dq = (torch.empty if call.leftpad is None else torch.zeros)(
        q.shape, dtype=q.dtype, device=q.device
    )
    config = _row_tiles("compressed_attention_bwd_dq", q, v)
    launch(_compressed_attention_bwd_dq_kernel, (_tiles_of(q, call, config["BLOCK_M"]), H, B))(
        *inputs, dq, rows, *sizes, before, factor, **constants, **config
    )

    N, config = k.shape[-3], _row_tiles("compressed_attention_bwd_dkdv", q, v)
    wide = torch.float32 if Hk != H else q.dtype
    dk, dv = (
        torch.zeros((*t.shape[:-2], H, t.shape[-1]), dtype=wide, device=q.device) for t in (k, v)
    )
    counts = None
    if rows is not None:
        blocks = call.blocks
        tokens = rows[:, 1] + rows[:, 3]
        counts = (tokens - blocks.block + blocks.stride).clamp(min=0) // blocks.stride
    launch(_compressed_attention_bwd_dkdv_kernel, (_tiles_of(k, call, config["BLOCK_N"]), H, B))(
        *inputs, dk, dv, rows, counts, *sizes, N, before, factor, **constants, **config
    )
    if Hk != H:
        dk, dv = (t.unflatten(-2, (Hk, H // Hk)).sum(-2).to(q.dtype) for t in (dk, dv))
    return dq, dk, dv


def _sizes(q: Tensor) -> tuple[int, int]:
    """Return the batch, 1 where packed, and the rows."""
    return (1 if q.ndim == 3 else q.shape[0]), q.shape[-3]


def _packed(call: SparseCall) -> int | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.numel() - 1


def _tiles_of(t: Tensor, call: SparseCall, block: int) -> int:
    """Return the tiles of the rows of t; each packed sequence may end in one of its own."""
    return cdiv(t.shape[-3], block) + (_packed(call) or 0)


def _row_tiles(kernel: str, q: Tensor, v: Tensor) -> Tiles:
    """Return the tiles of a kernel by the size of the heads; a few rows have small ones."""
    config = dict(tiles(kernel, head_size(max(q.shape[-1], v.shape[-1]), q.dtype), q.device))
    if q.shape[-3] <= _FEW_ROWS:
        config["BLOCK_M"] = _FEW_ROWS
    return config


def _constants(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> dict[str, Any]:
    return {
        "GROUP": q.shape[-2] // k.shape[-2], "D": q.shape[-1], "DV": v.shape[-1],
        "BLOCK": call.blocks.block, "STRIDE": call.blocks.stride,
    }  # fmt: skip


def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return _PROGRAMS_A_THREAD * torch.get_num_threads()
    count = _MULTIPROCESSORS
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_A_MULTIPROCESSOR * count
