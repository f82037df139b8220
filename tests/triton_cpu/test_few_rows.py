"""Products of a few rows with a matrix that is read where it lies: attention of one query."""

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import triton_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def scores_kernel(
    x_ptr, w_ptr, y_ptr, R, stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + ks[None, :])
    for first in range(0, R, N):
        w = tl.load(
            w_ptr + (first + columns)[:, None] * stride + ks[None, :],
            mask=(first + columns < R)[:, None], other=0.0,
        )  # fmt: skip
        y = (
            tl.dot(x, tl.trans(w), input_precision="ieee")
            if SUMS == 0
            else tl.dot(x, tl.trans(w), tl.full((M, N), SUMS, tl.float32), input_precision="ieee")
        )
        at = y_ptr + rows[:, None] * R + (first + columns)[None, :]
        tl.store(at, y, mask=(first + columns < R)[None, :])


@triton.jit
def values_kernel(
    x_ptr, v_ptr, y_ptr, R, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    y = tl.zeros((M, N), tl.float32)
    for first in range(0, R, K):
        is_row = first + ks < R
        x = tl.load(x_ptr + rows[:, None] * R + (first + ks)[None, :], is_row[None, :], other=0.0)
        at = v_ptr + (first + ks)[:, None] * stride + columns[None, :]
        v = tl.load(at, is_row[:, None], other=0.0)
        y = y * 0.5 + tl.dot(x, v.to(tl.float32), input_precision="ieee")
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y)


# whole blocks, a part of one, one row, none
@pytest.mark.pairwise
@pytest.mark.parametrize("R", [64, 41, 1, 0])
@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_along_memory(dtype, M, R):
    x = torch.randint(-8, 9, (M, 48)).to(dtype)[:, :32].contiguous()
    stored = torch.full((R + 1, 40), float("nan"), dtype=dtype)  # behind the last row as well
    stored[:R, :32] = torch.randint(-8, 9, (R, 32)).to(dtype)
    for start in (0, 3):
        y = torch.full((M, R), float("nan"))
        triton_cpu.launch(scores_kernel, (1,))(x, stored, y, R, 40, M=M, N=32, K=32, SUMS=start)
        torch.testing.assert_close(y, start + x.float() @ stored[:R, :32].float().T, rtol=0, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("R", [64, 41, 1, 0])
@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_along_memory(dtype, M, R):
    x = torch.randint(-8, 9, (M, R)).float() + 2.0**-12  # not to be rounded to the matrix's dtype
    stored = torch.full((R + 1, 40), float("nan"), dtype=dtype)
    stored[:R, :32] = torch.randint(-8, 9, (R, 32)).to(dtype)
    y, expected = torch.full((M, 32), float("nan")), torch.zeros(M, 32)
    triton_cpu.launch(values_kernel, (1,))(x, stored, y, R, 40, M=M, N=32, K=32)
    for first in range(0, R, 32):
        part = slice(first, min(first + 32, R))
        expected = expected * 0.5 + x[:, part] @ stored[part, :32].float()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-4)


@triton.jit
def listed_kernel(
    x_ptr, w_ptr, rows_ptr, y_ptr, z_ptr, R, stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m, n, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + ks[None, :])
    z = tl.zeros((M, K), tl.float32)
    for first in range(0, R, N):
        row = tl.load(rows_ptr + first + n)
        at = w_ptr + row[:, None] * stride + ks[None, :]
        if MASKED:
            w = tl.load(at, mask=(row >= 0)[:, None], other=0.0)
        else:
            w = tl.load(at)
        y = tl.dot(x, tl.trans(w), input_precision="ieee")
        z = z * 0.5 + tl.dot(y, w.to(tl.float32), input_precision="ieee")
        tl.store(y_ptr + m[:, None] * R + (first + n)[None, :], y)
    tl.store(z_ptr + m[:, None] * K + ks[None, :], z)


@pytest.mark.pairwise
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("N", [4, 16, 32])
@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_anywhere(dtype, M, N, masked):
    x = torch.randint(-4, 5, (M, 32)).to(dtype)
    w = torch.randint(-4, 5, (50, 40)).to(dtype)
    rows = torch.randint(0, 50, (64,), dtype=torch.int32)
    if masked:
        rows[torch.rand(64) < 0.5] = -1
    y, z, expected = torch.empty(M, 64), torch.empty(M, 32), torch.zeros(M, 32)
    triton_cpu.launch(listed_kernel, (1,))(x, w, rows, y, z, 64, 40, M=M, N=N, K=32, MASKED=masked)
    listed = torch.where((rows >= 0)[:, None], w[rows.clamp_min(0), :32].float(), 0.0)
    torch.testing.assert_close(y, x.float() @ listed.T, rtol=0, atol=0)
    for first in range(0, 64, N):
        part = slice(first, first + N)
        expected = expected * 0.5 + y[:, part] @ listed[part]
    # sums of up to 2**17, some of which cancel
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0.05)


@triton.jit
def listed_and_overwritten_kernel(
    x_ptr, w_ptr, rows_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    m, n, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + ks[None, :])
    y = tl.zeros((M, N), tl.float32)
    for _ in range(2):
        at = w_ptr + tl.load(rows_ptr + n)[:, None] * K + ks[None, :]
        w = tl.load(at)
        tl.store(at, tl.zeros_like(w))
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_listed_rows_are_read_before_their_memory_is_overwritten(dtype, M):
    x, w = (torch.randint(-4, 5, (n, 32)).to(dtype) for n in (M, 16))
    rows, stored = torch.randperm(16).int(), w.clone()
    y = torch.empty(M, 16)
    triton_cpu.launch(listed_and_overwritten_kernel, (1,))(x, stored, rows, y, M=M, N=16, K=32)
    torch.testing.assert_close(y, x.float() @ w[rows.long()].float().T, rtol=0, atol=0)
    assert not stored.any()


@triton.jit
def overwritten_kernel(
    x_ptr, w_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + ks[None, :])
    if KIND == "transposed":
        at = w_ptr + columns[:, None] * K + ks[None, :]
        w = tl.trans(tl.load(at)).to(tl.float32)
    else:
        at = w_ptr + ks[:, None] * N + columns[None, :]
        w = tl.load(at).to(tl.float32)
    y = tl.zeros((M, N), tl.float32)
    if KIND == "loop":
        for _ in range(2):
            y += tl.dot(x, w, input_precision="ieee")
            tl.store(at, tl.zeros_like(w).to(w_ptr.dtype.element_ty))
    else:
        tl.store(at, tl.zeros_like(tl.load(at)))
        y = tl.dot(x, w, y, input_precision="ieee")
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["widened", "transposed", "loop"])
@pytest.mark.parametrize("M", [1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_is_read_before_its_memory_is_overwritten(dtype, M, kind):
    x, w = torch.randint(-8, 9, (M, 16)).float(), torch.randint(-8, 9, (16, 32)).to(dtype)
    stored = w.T.contiguous() if kind == "transposed" else w.clone()
    y = torch.empty(M, 32)
    triton_cpu.launch(overwritten_kernel, (1,))(x, stored, y, M=M, N=32, K=16, KIND=kind)
    expected = x @ w.float() * (2 if kind == "loop" else 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert not stored.any()


@triton.jit
def carried_kernel(x_ptr, w_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    y = tl.zeros((M, N), tl.float32)
    for i in range(2):
        x = tl.load(x_ptr + rows[:, None] * 2 * K + (i * K + ks)[None, :])
        at = w_ptr + columns[:, None] * 2 * K + (i * K + ks)[None, :]
        w = tl.load(at)
        tl.store(at, tl.zeros_like(w))
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y)


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_a_loop_that_overwrites_what_it_multiplies(dtype, M):
    x, w = (torch.randint(-8, 9, (n, 32)).to(dtype) for n in (M, 16))
    stored, y = w.clone(), torch.empty(M, 16)
    triton_cpu.launch(carried_kernel, (1,))(x, stored, y, M=M, N=16, K=16)
    torch.testing.assert_close(y, x.float() @ w.float().T, rtol=0, atol=0)
