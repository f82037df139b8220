"""Rows that are shorter than the block that holds them: loops are split where their masks end."""

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import triton_cpu

BLOCK = 256
# before the block, its edges, and beyond it
LENGTHS = [-3, 0, 1, 255, 256, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=7)
    tl.store(out_ptr + at, x)


@triton.jit
def two_ends_kernel(x_ptr, out_ptr, n, m, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=7)
    tl.store(out_ptr + at, x + 1, mask=at < m)


@triton.jit
def choose_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=7)
    out = tl.where(at < n, x, -x) + tl.where((at < n) | (x == 7), 1, 2)
    tl.store(out_ptr + at, out)


@triton.jit
def sums_kernel(x_ptr, out_ptr, stride, M, N, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=1)
    tl.store(out_ptr + rows, tl.sum(x, 1))


@triton.jit
def wrapping_kernel(x_ptr, out_ptr, start, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=start + at < n, other=7)
    tl.store(out_ptr + at, x)


@triton.jit
def flags_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    is_small = tl.exp(x) < 1  # dear, and read twice
    tl.store(out_ptr + at, tl.where(is_small, x, 0.0))
    tl.store(out_ptr + BLOCK + at, is_small.to(tl.float32))


def numbers(dtype, size=BLOCK + 64):
    return torch.randint(-100, 100, (size,)).to(dtype)


def guarded(n, x, other):
    at = torch.arange(BLOCK)
    return torch.where(at < n, x[:BLOCK], other)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_what_the_mask_lets_pass(dtype, n):
    x, out = numbers(dtype), torch.empty(BLOCK, dtype=dtype)
    triton_cpu.launch(copy_kernel, (1,))(x, out, n, BLOCK=BLOCK)
    torch.testing.assert_close(out, guarded(n, x, torch.tensor(7, dtype=dtype)))


@pytest.mark.pairwise
@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_masks_may_end_at_different_places(n, m):
    x, out = numbers(torch.int32), torch.full((BLOCK,), -1000, dtype=torch.int32)
    triton_cpu.launch(two_ends_kernel, (1,))(x, out, n, m, BLOCK=BLOCK)
    expected = torch.where(torch.arange(BLOCK) < m, guarded(n, x, torch.tensor(7)) + 1, -1000)
    torch.testing.assert_close(out, expected.int())


@pytest.mark.parametrize("n", LENGTHS)
def test_what_the_mask_chooses_is_chosen(n):
    x, out = numbers(torch.int32), torch.empty(BLOCK, dtype=torch.int32)
    triton_cpu.launch(choose_kernel, (1,))(x, out, n, BLOCK=BLOCK)
    read = guarded(n, x, torch.tensor(7))
    inside = torch.arange(BLOCK) < n
    expected = torch.where(inside, read, -read) + torch.where(inside | (read == 7), 1, 2)
    torch.testing.assert_close(out, expected.int())


@pytest.mark.parametrize("M", [1, 3, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_sums_of_masked_rows(n, M):
    x = torch.randint(-100, 100, (4, 320)).float()
    out = torch.empty(4)
    triton_cpu.launch(sums_kernel, (1,))(x, out, 320, M, n, BLOCK_M=4, BLOCK=BLOCK)
    visible = (torch.arange(4) < M)[:, None] & (torch.arange(BLOCK) < n)
    torch.testing.assert_close(out, torch.where(visible, x[:, :BLOCK], 1.0).sum(1))


def test_a_mask_that_wraps_around_is_no_prefix():
    x, out = numbers(torch.int32), torch.empty(BLOCK, dtype=torch.int32)
    start = 2**31 - 100
    triton_cpu.launch(wrapping_kernel, (1,))(x, out, start, 5, BLOCK=BLOCK)
    inside = torch.arange(BLOCK) >= 100  # from there on the sum is negative
    torch.testing.assert_close(out, torch.where(inside, x[:BLOCK], 7).int())


@pytest.mark.parametrize("n", LENGTHS)
def test_flags_that_are_written_out(n):
    x, out = torch.randn(BLOCK + 64), torch.empty(2 * BLOCK)
    triton_cpu.launch(flags_kernel, (1,))(x, out, n, BLOCK=BLOCK)
    read = guarded(n, x, torch.tensor(0.0))
    small = read < 0
    torch.testing.assert_close(
        out, torch.cat([read.where(small, torch.tensor(0.0)), small.float()])
    )


def test_nothing_beyond_the_end_is_read(fenced):
    x, out = fenced(numbers(torch.int8, 100)), torch.empty(BLOCK, dtype=torch.int8)
    triton_cpu.launch(copy_kernel, (1,))(x, out, 100, BLOCK=BLOCK)
    assert torch.equal(out[:100], x)
    assert (out[100:] == 7).all()


@triton.jit
def transposed_product_kernel(
    a_ptr, w_ptr, out_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, ks, tokens = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    at = rows[:, None] * K + ks[None, :]
    w = tl.load(w_ptr + at, mask=(rows < N)[:, None] & (ks < K)[None, :], other=0.0)
    a = tl.load(a_ptr + tokens[:, None] * K + ks[None, :], mask=(ks < K)[None, :], other=0.0)
    out = tl.dot(a, tl.trans(w), input_precision="ieee")
    tl.store(out_ptr + tokens[:, None] * BLOCK_N + rows[None, :], out)


@pytest.mark.parametrize("N", [1, 20, 64])
@pytest.mark.parametrize("K", [1, 60, 100, 128])
def test_rows_below_a_transposition_end_where_they_did(N, K, fenced):
    a, w = torch.randn(16, K), fenced(torch.randn(N, K))
    out = torch.empty(16, 64)
    triton_cpu.launch(transposed_product_kernel, (1,))(
        a, w, out, N, K, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128
    )
    torch.testing.assert_close(out[:, :N], a @ w.T)
    assert not out[:, N:].any()
