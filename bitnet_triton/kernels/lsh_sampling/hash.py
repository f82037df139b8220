"""Triton codes of vectors: one program takes a tile of rows and of tables, bit by bit.

Rows are tokens where tables are built, and heads where a step has one token. Which ones, strides
say: of batches b, of outer numbers o, of rows m, and of the token that ``slots`` names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_triton.kernels.common.attention import load_rows
from bitnet_triton.kernels.common.dependent import dependent, wait_for_inputs
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import tiles
from bitnet_triton.runtime.device import smallest_dot


@triton.jit
def _lsh_hash_kernel(
    # tensors: x [B T O M D], whose order strides say; planes [K L D] and centre [B M D], float32,
    # the latter or None; codes int16 and norms float32 [B O M T], the latter or None
    x_ptr, planes_ptr, centre_ptr, codes_ptr, norms_ptr,
    # int32 [B]: the token of each row of the batch; None: the first one
    slots_ptr,
    # strides, in elements
    x_stride_b, x_stride_o, x_stride_m, x_stride_t, planes_stride_k, planes_stride_o,
    centre_stride_b, centre_stride_o, centre_stride_m,
    codes_stride_b, codes_stride_o, codes_stride_m, codes_stride_l, codes_stride_t,
    norms_stride_b, norms_stride_o, norms_stride_m,
    # sizes and scalars: codes begin at token ``base``
    M, L, OUTER, base,
    # compile-time
    DEPENDENT: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    b = tl.program_id(2) // OUTER
    o = (tl.program_id(2) % OUTER).to(tl.int64)
    batch = b.to(tl.int64)
    slot = batch * 0
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    is_row = m < M
    is_table = t < L

    x_ptr += batch * x_stride_b + o * x_stride_o + slot * x_stride_t
    x = load_rows(x_ptr, m, x_stride_m, is_row, D, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if centre_ptr is not None:
        centre_ptr += batch * centre_stride_b + o * centre_stride_o
        x -= load_rows(centre_ptr, m, centre_stride_m, is_row, D, BLOCK_D)
    codes = tl.zeros((BLOCK_M, BLOCK_L), tl.int32)
    planes_ptr += o * planes_stride_o
    for bit in range(BITS):
        planes = load_rows(planes_ptr + bit * planes_stride_k, t, D, is_table, D, BLOCK_D)
        sides = tl.dot(x, tl.trans(planes), input_precision="ieee")  # [BLOCK_M, BLOCK_L]
        codes |= (sides > 0).to(tl.int32) << bit

    # as 16 bits whose order nobody asks for
    rows = m.to(tl.int64)
    at = codes_ptr + batch * codes_stride_b + o * codes_stride_o + (slot - base) * codes_stride_t
    at += rows[:, None] * codes_stride_m + t.to(tl.int64)[None, :] * codes_stride_l
    tl.store(at, codes.to(tl.int16), mask=is_row[:, None] & is_table[None, :])
    if norms_ptr is not None:
        norms = tl.sqrt(tl.sum(x * x, axis=1))
        at = norms_ptr + batch * norms_stride_b + o * norms_stride_o + slot + rows * norms_stride_m
        tl.store(at, norms, mask=is_row & (tl.program_id(1) == 0))


@triton.jit
def _lsh_mean_direction_kernel(
    # tensors: q [B 1 H D]; out [B 1 Hk D] float32
    q_ptr, out_ptr,
    # strides, in elements
    q_stride_b, q_stride_h,
    # compile-time
    DEPENDENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    kv, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g = tl.arange(0, ROWS)
    at = q_ptr + batch * q_stride_b + kv * GROUP * q_stride_h
    q = load_rows(at, g, q_stride_h, g < GROUP, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
    norm = tl.sqrt(tl.sum(q * q, axis=1))
    mean = tl.sum(q / tl.maximum(norm, 1e-30)[:, None], axis=0) / GROUP
    dims = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + (batch * tl.num_programs(0) + kv) * D + dims, mean, mask=dims < D)


def launch_hash_keys(
    keys: Tensor, planes: Tensor, centre: Tensor, codes: Tensor, norms: Tensor
) -> None:
    """Write the codes [B Hk L T] of keys [B T Hk D], and how far each is from its centre [B Hk T].

    Args:
        keys: last dimension contiguous.
        planes: float32 [K L D].
        centre: float32 [B Hk D].
        codes: int16, of any strides.
        norms: float32, its last dimension contiguous.
    """
    (B, T, Hk, D), (bits, L) = keys.shape, planes.shape[:2]
    if T == 0:
        return
    config = tiles("lsh_hash", T, keys.device)
    launch(_lsh_hash_kernel, (cdiv(T, config["BLOCK_M"]), cdiv(L, config["BLOCK_L"]), B * Hk))(
        keys, planes, centre, codes, norms, None,
        keys.stride(0), keys.stride(2), keys.stride(1), 0, planes.stride(0), 0,
        centre.stride(0), centre.stride(1), 0,
        codes.stride(0), codes.stride(1), codes.stride(3), codes.stride(2), 0,
        norms.stride(0), norms.stride(1), norms.stride(2),
        T, L, Hk, 0,
        D=D, BITS=bits, **config, **dependent(keys.device),
    )  # fmt: skip


def launch_hash_token(
    keys: Tensor, planes: Tensor, centre: Tensor, codes: Tensor, norms: Tensor, slots: Tensor,
    base: int,
) -> None:  # fmt: skip
    """Write the code and the norm of one token a row, by launches alone.

    Args:
        keys: [B T Hk D], last dimension contiguous.
        planes: float32 [K L D].
        centre: float32 [B Hk D].
        codes: int16 [B Hk L tail]; token ``base`` comes first.
        norms: float32 [B Hk T].
        slots: int32 [B], which token it is.
        base: the first token of ``codes``.
    """
    (B, _, Hk, D), (bits, L) = keys.shape, planes.shape[:2]
    config = dict(tiles("lsh_hash", Hk, keys.device))
    config["BLOCK_M"] = max(triton.next_power_of_2(Hk), smallest_dot(keys.device))
    launch(_lsh_hash_kernel, (1, cdiv(L, config["BLOCK_L"]), B))(
        keys, planes, centre, codes, norms, slots,
        keys.stride(0), 0, keys.stride(2), keys.stride(1), planes.stride(0), 0,
        centre.stride(0), 0, centre.stride(1),
        codes.stride(0), 0, codes.stride(1), codes.stride(2), codes.stride(3),
        norms.stride(0), 0, norms.stride(1),
        Hk, L, 1, base,
        D=D, BITS=bits, **config, **dependent(keys.device),
    )  # fmt: skip


def launch_hash_queries(q: Tensor, planes: Tensor, codes: Tensor, parts: int) -> None:
    """Write the codes [B lists L / parts] of queries [B 1 lists D].

    Args:
        q: last dimension contiguous.
        planes: float32 [K L D].
        codes: int16, contiguous.
        parts: of several, query head h takes the tables of part ``h % parts``.
    """
    (B, _, lists, D), (bits, L) = q.shape, planes.shape[:2]
    rows, tables = lists // parts, L // parts
    config = dict(tiles("lsh_hash", rows, q.device))
    config["BLOCK_M"] = min(
        config["BLOCK_M"], max(triton.next_power_of_2(rows), smallest_dot(q.device))
    )
    grid = (cdiv(rows, config["BLOCK_M"]), cdiv(tables, config["BLOCK_L"]), B * parts)
    launch(_lsh_hash_kernel, grid)(
        q, planes, None, codes, None, None,
        q.stride(0), q.stride(2), parts * q.stride(2), 0, planes.stride(0), tables * D,
        0, 0, 0,
        lists * tables, tables, parts * tables, 1, 0,
        0, 0, 0,
        rows, tables, parts, 0,
        D=D, BITS=bits, **config, **dependent(q.device),
    )  # fmt: skip


def launch_mean_direction(q: Tensor, Hk: int) -> Tensor:
    """Return the mean of the normalised queries [B 1 H D] of each group, float32 [B 1 Hk D]."""
    B, _, H, D = q.shape
    out = q.new_empty((B, 1, Hk, D), dtype=torch.float32)
    rows = triton.next_power_of_2(H // Hk)
    launch(_lsh_mean_direction_kernel, (Hk, B))(
        q, out, q.stride(0), q.stride(2), GROUP=H // Hk, D=D, ROWS=rows,
        **tiles("lsh_mean_direction", D, q.device), **dependent(q.device),
    )  # fmt: skip
    return out
