"""int8 products whose right operand lies in fours along its rows, as packed codes or bytes."""

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import triton_cpu

N, K = 64, 32


@triton.jit
def fours_kernel(
    x_ptr, codes_ptr, y_ptr, other_ptr, TILES, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, STORE: tl.constexpr, ALSO: tl.constexpr,
):  # fmt: skip
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    rows, cols = tl.arange(0, K // 4), tl.arange(0, 4 * N)
    low = tl.full((M, N), 3, tl.int32)
    high = tl.zeros((M, N), tl.int32)
    for tile in range(TILES):
        at = codes_ptr + tile * K * N + rows[:, None] * (4 * N) + cols[None, :]
        both = tl.load(at, mask=(rows < ROWS)[:, None], other=0)
        x = tl.load(x_ptr + (tile * M + m)[:, None] * K + k[None, :])  # [M, K]
        few = tl.reshape(
            tl.permute(tl.reshape((both & 15).to(tl.int8), (K // 4, N, 4)), (0, 2, 1)), (K, N)
        )
        many = tl.reshape(
            tl.permute(tl.reshape((both >> 4).to(tl.int8), (K // 4, N, 4)), (0, 2, 1)), (K, N)
        )
        if STORE:  # writes the memory of the codes before they are multiplied
            tl.store(at, (both * 0 + 77).to(tl.uint8))
        low = tl.dot(x, few, low, out_dtype=tl.int32)
        high = tl.dot(x, many, high, out_dtype=tl.int32)
        if ALSO:  # something else reads them as well
            tl.store(other_ptr + tile * K * N + k[:, None] * N + n[None, :], few)
    tl.store(y_ptr + m[:, None] * N + n[None, :], low)
    tl.store(y_ptr + M * N + m[:, None] * N + n[None, :], high)


# products unpack them where rows are few, and pack them where they are many
@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize(
    ("rows", "store", "also"),
    [(K // 4, False, False), (5, False, False), (K // 4, True, False), (K // 4, False, True)],
)
def test_codes_in_fours(M, rows, store, also):
    tiles = 3
    x = torch.randint(-128, 128, (tiles, M, K), dtype=torch.int8)
    stored = torch.randint(0, 256, (tiles, K // 4, N, 4), dtype=torch.uint8)
    codes = torch.where(torch.arange(K // 4)[:, None, None] < rows, stored, 0)
    codes = codes.transpose(2, 3).reshape(tiles, K, N)
    y, other = torch.empty(2, M, N, dtype=torch.int32), torch.empty(tiles, K, N, dtype=torch.int8)
    triton_cpu.launch(fours_kernel, (1,))(
        x, stored, y, other, tiles, M=M, N=N, K=K, ROWS=rows, STORE=store, ALSO=also
    )
    few, many = ((x.double() @ c.double()).sum(0) for c in (codes & 15, codes >> 4))
    assert torch.equal(y[0], few.to(torch.int32) + 3)
    assert torch.equal(y[1], many.to(torch.int32))
    if also:
        assert torch.equal(other, (codes & 15).to(torch.int8))
    if store:
        assert (stored == 77).all()


@triton.jit
def signed_kernel(
    x_ptr, w_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    rows, cols = tl.arange(0, K // 4), tl.arange(0, 4 * N)
    w = tl.load(w_ptr + rows[:, None] * (4 * N) + cols[None, :])
    w = tl.reshape(tl.permute(tl.reshape(w, (K // 4, N, 4)), (0, 2, 1)), (K, N))
    x = tl.load(x_ptr + m[:, None] * K + k[None, :]) & MASK
    y = tl.dot(x, w, out_dtype=tl.int32)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


# 127: the left operand is known not to be negative
@pytest.mark.parametrize("mask", [-1, 127])
@pytest.mark.parametrize("M", [4, 16])
def test_signed_bytes_in_fours(M, mask):
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    w = torch.randint(-128, 128, (K // 4, N, 4), dtype=torch.int8)
    y = torch.empty(M, N, dtype=torch.int32)
    triton_cpu.launch(signed_kernel, (1,))(x, w, y, M=M, N=N, K=K, MASK=mask)
    matrix = w.transpose(1, 2).reshape(K, N).double()
    assert torch.equal(y, ((x & mask).double() @ matrix).to(torch.int32))
