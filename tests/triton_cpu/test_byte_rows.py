"""int8 products with few vectors: row by row, packed codes, and vectors that are masked off."""

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import triton_cpu

ROWS = 8
# all widths of a pass, more than one pass, a whole block, and none
COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16]


@triton.jit
def codes_kernel(
    x_ptr, packed_ptr, y_ptr, M, R, K, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTORS_LEFT: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    vectors, rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    low = tl.zeros((BLOCK_R, BLOCK_M), tl.int32)
    high = tl.full((BLOCK_R, BLOCK_M), 5, tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        at = packed_ptr + rows[:, None] * K + (k + ks)[None, :]
        packed = tl.load(at, (rows < R)[:, None] & in_k[None, :], other=0) ^ FLIPPED
        mask = (vectors < M)[None, :] & in_k[:, None]
        x = tl.load(x_ptr + vectors[None, :] * K + (k + ks)[:, None], mask, other=0)
        if VECTORS_LEFT:
            x = tl.trans(x)
            low += tl.trans(tl.dot(x, tl.trans((packed & 7).to(tl.int8)), out_dtype=tl.int32))
            high += tl.trans(tl.dot(x, tl.trans((packed >> 5).to(tl.int8)), out_dtype=tl.int32))
        else:
            low = tl.dot((packed & 7).to(tl.int8), x, low, out_dtype=tl.int32)
            high = tl.dot((packed >> 5).to(tl.int8), x, high, out_dtype=tl.int32)
    out = y_ptr + vectors[None, :] * (2 * BLOCK_R) + rows[:, None]
    tl.store(out, low, (vectors < M)[None, :])
    tl.store(out + BLOCK_R, high, (vectors < M)[None, :])


@triton.jit
def signed_kernel(x_ptr, w_ptr, y_ptr, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    vectors, rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, 8), tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, 8), tl.int32)
    for k in range(0, K, BLOCK_K):
        in_k = (k + ks < K)[None, :]
        w = tl.load(w_ptr + rows[:, None] * K + (k + ks)[None, :], in_k, other=0)
        mask = (vectors < M)[:, None] & in_k
        x = tl.load(x_ptr + vectors[:, None] * K + (k + ks)[None, :], mask, other=0)
        sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
    tl.store(y_ptr + vectors[:, None] * 8 + rows[None, :], sums, (vectors < M)[:, None])


def bytes_of(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def product(x, w):
    return (x.double() @ w.double().T).to(torch.int32)


# K: whole trips, a rest of whole stretches of 64 bytes, and one of less
@pytest.mark.pairwise
@pytest.mark.parametrize("K", [2048, 1024 + 192, 1024 + 100])
@pytest.mark.parametrize("M", COUNTS)
@pytest.mark.parametrize("vectors_left", [False, True])
def test_packed_codes(M, K, vectors_left):
    check_codes(M, ROWS, K, vectors_left, 0)


# flipped: codes of rows that are masked off are not zeros
@pytest.mark.parametrize("flipped", [0, 255])
@pytest.mark.parametrize("R", [0, 1, 5, 8])
@pytest.mark.parametrize("M", [1, 2, 7])
def test_rows_that_are_masked_off(M, R, flipped):
    check_codes(M, R, 1024 + 192, False, flipped)


def check_codes(M, R, K, vectors_left, flipped):
    # what lies behind the last row is not zeros
    x, stored = bytes_of(M, K), torch.randint(0, 256, (ROWS, K), dtype=torch.uint8)
    packed = torch.where(torch.arange(ROWS)[:, None] < R, stored, 0) ^ flipped
    y = torch.full((M, 2 * ROWS), -1, dtype=torch.int32)
    triton_cpu.launch(codes_kernel, (1,))(
        x, stored, y, M, R, K, BLOCK_M=16, BLOCK_R=ROWS, BLOCK_K=1024, VECTORS_LEFT=vectors_left,
        FLIPPED=flipped,
    )  # fmt: skip
    torch.testing.assert_close(y[:, :ROWS], product(x, packed & 7), rtol=0, atol=0)
    torch.testing.assert_close(y[:, ROWS:], product(x, packed >> 5) + 5, rtol=0, atol=0)


# BLOCK_K: sums of lanes that wait for the end of the loop, and those that are added up at once
@pytest.mark.parametrize(
    ("BLOCK_K", "BLOCK_M", "M"),
    [(128, 4, 1), (128, 4, 3), (128, 4, 4), (1024, 32, 2), (1024, 32, 21), (1024, 32, 32)],
)
def test_signed_bytes(BLOCK_K, BLOCK_M, M):
    x, w = bytes_of(M, 2240), bytes_of(8, 2240)
    y = torch.full((M, 8), -1, dtype=torch.int32)
    triton_cpu.launch(signed_kernel, (1,))(x, w, y, M, 2240, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K)
    torch.testing.assert_close(y, product(x, w), rtol=0, atol=0)
