"""The grid, the tensors a kernel makes by itself, and the arithmetic of indices."""

import inspect

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def grid_kernel(y_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(axis=2)
    X, Y, Z = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    here = y_ptr + ((z * Y + y) * X + x) * 4
    tl.store(here, x)
    tl.store(here + 1, y)
    tl.store(here + 2, z)
    tl.store(here + 3, X * 10000 + Y * 100 + Z)


@pytest.mark.ops("program_id", "num_programs")
@pytest.mark.parametrize("grid", [(1,), (5,), (3, 4), (2, 3, 5), (1, 1, 7)], ids=str)
def test_every_program_of_a_grid_runs_once(run, check, grid):
    X, Y, Z = (*grid, 1, 1)[:3]
    y = torch.full((Z, Y, X, 4), -1, dtype=torch.int32)
    run(grid_kernel, grid)(y)
    z, y_, x = torch.meshgrid(*(torch.arange(n) for n in (Z, Y, X)), indexing="ij")
    sizes = torch.full_like(x, X * 10000 + Y * 100 + Z)
    check(y, torch.stack([x, y_, z, sizes], -1))


@triton.jit
def counted_kernel(count_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(count_ptr, 1)


@pytest.mark.ops("program_id")
def test_a_grid_may_be_a_function_of_the_arguments(run, check):
    count = torch.zeros(1, dtype=torch.int32)
    run(counted_kernel, lambda meta: (triton.cdiv(100, meta["BLOCK"]),))(count, BLOCK=16)
    check(count, torch.tensor([7]))


@triton.jit
def made_kernel(x_ptr, i_ptr, f_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(i_ptr + i, tl.arange(BLOCK, 2 * BLOCK))
    tl.store(i_ptr + BLOCK + i, tl.full((BLOCK,), -3, tl.int32))
    tl.store(i_ptr + 2 * BLOCK + i, tl.zeros([BLOCK], dtype=tl.int32))
    tl.store(i_ptr + 3 * BLOCK + i, tl.zeros_like(i) + 4)
    n = tl.program_id(0) + 5
    tl.store(i_ptr + 4 * BLOCK + i, tl.full((BLOCK,), n, tl.int64))
    x = tl.load(x_ptr + i)
    tl.store(f_ptr + i, tl.zeros_like(x))
    tl.store(f_ptr + BLOCK + i, tl.full((BLOCK,), 0.1, tl.float32))
    tl.store(f_ptr + 2 * BLOCK + i, tl.full((BLOCK,), float("inf"), tl.float32))
    tl.store(f_ptr + 3 * BLOCK + i, tl.full((BLOCK,), float("-inf"), tl.float16).to(tl.float32))
    tl.store(f_ptr + 4 * BLOCK + i, tl.full((BLOCK,), float("nan"), tl.float32))
    tl.store(f_ptr + 5 * BLOCK + i, tl.full((BLOCK,), 1e-40, tl.float32))
    tl.store(f_ptr + 6 * BLOCK + i, x * 0.0 + 16777217)
    tl.store(f_ptr + 7 * BLOCK + i, tl.full((BLOCK,), -0.0, tl.float32))
    tl.store(f_ptr + 8 * BLOCK + i, tl.full((BLOCK,), 3.4028234663852886e38, tl.float32))


@pytest.mark.ops("arange", "full", "zeros", "zeros_like")
def test_tensors_are_made_from_constants(run, check):
    x = torch.randn(16)
    i, f = torch.empty(5, 16, dtype=torch.int32), torch.empty(9, 16)
    run(made_kernel, (1,))(x, i, f, BLOCK=16)
    constants = torch.tensor([[-3], [0], [4], [5]]).expand(4, 16)
    check(i, torch.cat([torch.arange(16, 32)[None], constants]))
    inf = float("inf")
    values = [0.0, 0.1, inf, -inf, float("nan"), 1e-40, 16777216.0, -0.0, 3.4028234663852886e38]
    check(f, torch.tensor(values)[:, None].expand(9, 16))


@triton.jit
def concatenated_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK)
    z = tl.cat(tl.load(x_ptr + i), tl.load(y_ptr + i), can_reorder=True)
    tl.store(z_ptr + j, z)


@pytest.mark.ops("cat")
def test_two_tensors_become_one(run, check):
    x, y, z = torch.randn(16), torch.randn(16), torch.empty(32)
    run(concatenated_kernel, (1,))(x, y, z, BLOCK=16)
    check(z.sort()[0], torch.cat([x, y]).sort()[0])  # the order is the compiler's


@triton.jit
def concatenated_along_kernel(
    x_ptr, y_ptr, z_ptr, w_ptr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + m * N + n), tl.load(y_ptr + m * N + n)
    wide, tall = tl.arange(0, 2 * N)[None, :], tl.arange(0, 2 * M)[:, None]
    tl.store(z_ptr + m * 2 * N + wide, tl.cat(x, y, dim=1))
    tl.store(w_ptr + tall * N + n, tl.cat(x, y, dim=0))


@pytest.mark.ops("cat")
@pytest.mark.skipif(
    "dim" not in inspect.signature(tl.cat).parameters, reason="this Triton's cat has no dim"
)
def test_two_tensors_are_joined_along_an_axis(run, check):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    z, w = torch.empty(4, 16), torch.empty(8, 8)
    run(concatenated_along_kernel, (1,))(x, y, z, w, M=4, N=8)
    check(z, torch.cat([x, y], 1))
    check(w, torch.cat([x, y], 0))


@triton.jit
def swizzled_kernel(y_ptr, M, N, GROUP: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    new_i, new_j = tl.swizzle2d(i, j, M, N, GROUP)
    tl.store(y_ptr + new_i * N + new_j, i * N + j)


@pytest.mark.ops("swizzle2d")
def test_swizzling_visits_groups_of_rows_by_column(run, check):
    M, N, group = 7, 5, 3
    y = torch.empty(M, N, dtype=torch.int32)
    run(swizzled_kernel, (M, N))(y, M, N, GROUP=group)
    parts, start = [], 0
    for rows in (3, 3, 1):
        numbers = torch.arange(start, start + rows * N)
        parts.append(numbers.view(N, rows).T)
        start += rows * N
    check(y, torch.cat(parts))


@triton.jit
def indices_kernel(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.cdiv(i + n, 3))
    tl.store(y_ptr + BLOCK + i, tl.cdiv(n, BLOCK) * 100 + tl.cdiv(BLOCK, 3))
    tl.store(y_ptr + 2 * BLOCK + i, tl.where(i < n, i * 2, -i))
    tl.store(y_ptr + 3 * BLOCK + i, tl.where(n > 3, i, 0) + tl.where(n > 30, 1000, 2000))
    tl.store(y_ptr + 4 * BLOCK + i, tl.where(i % 3 == 0, 1, tl.where(i % 3 == 1, i, n)))


@pytest.mark.ops("cdiv", "where")
def test_indices_are_divided_and_chosen(run, check):
    n, y = 11, torch.empty(5, 16, dtype=torch.int32)
    run(indices_kernel, (1,))(y, n, BLOCK=16)
    i = torch.arange(16)
    rows = [(i + n + 2) // 3, torch.full_like(i, 106), torch.where(i < n, i * 2, -i), i + 2000]
    chosen = torch.where(i % 3 == 0, 1, torch.where(i % 3 == 1, i, n))
    check(y, torch.stack([*rows, chosen]))


@triton.jit
def tensors_from_python_kernel(y_ptr, n, BLOCK: tl.constexpr):
    a = tl.to_tensor(3)
    b = tl.to_tensor(n)
    tl.store(y_ptr, a + b)
    tl.store(y_ptr + 1, tl.to_tensor(BLOCK).to(tl.int64))
    tl.store(y_ptr + 2, tl.cast(2.9, tl.int32))
    tl.store(y_ptr + 3, tl.cast(b, tl.float32) / 2 > 2.4)


@pytest.mark.ops("to_tensor", "cast")
@pytest.mark.skipif(not hasattr(tl, "to_tensor"), reason="new in Triton 3.7")
def test_python_numbers_become_tensors(run, check):
    y = torch.empty(4, dtype=torch.int64)
    run(tensors_from_python_kernel, (1,))(y, 5, BLOCK=16)
    check(y, torch.tensor([8, 16, 2, 1]))


@triton.jit
def sixty_four_bits_kernel(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(y_ptr + i, i * n)
    tl.store(y_ptr + BLOCK + i, i + 0x7FFFFFFFFFFFFFF0)
    tl.store(y_ptr + 2 * BLOCK + i, (i << 40) // (n - 1))


@pytest.mark.ops("arange")
def test_indices_of_64_bits_keep_them(run, check):
    n, y = 2**40 + 3, torch.empty(3, 8, dtype=torch.int64)
    run(sixty_four_bits_kernel, (1,))(y, n, BLOCK=8)
    i = torch.arange(8)
    check(y, torch.stack([i * n, i + 0x7FFFFFFFFFFFFFF0, (i << 40) // (n - 1)]))
