"""Functions that return early, wherever they are called, and what functions of scalars may do."""

import pytest
import torch
import triton
import triton.language as tl

has_map = pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="not in this Triton")


@triton.jit
def either(x, y):
    if y == 0:
        return x + 1
    else:
        return x * 2


@triton.jit
def bounded(x, low, high):
    if x < low:
        return low, -1
    if x > high:
        if high > 5:
            return high, 1
        x = x - high
    elif x == low:
        return x, 7
    return x, 0


@triton.jit
def in_branch_kernel(x_ptr, y_ptr, n):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid)
    if pid < n:
        x = either(x, pid % 2)
    tl.store(y_ptr + pid, x)


@pytest.mark.ops("early returns", "functions")
def test_a_function_called_in_a_branch_may_return_early(run, check):
    x, y = torch.randint(-9, 9, (6,)).int(), torch.empty(6).int()
    run(in_branch_kernel, (6,))(x, y, 4)
    check(y, torch.stack([x[0] + 1, x[1] * 2, x[2] + 1, x[3] * 2, x[4], x[5]]))


@triton.jit
def in_loops_kernel(x_ptr, y_ptr, n):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid)
    seen = x * 0
    for k in range(n):
        while x < 20 * k:
            x = either(x, k % 2) + 3
            if x > 10:
                x, what = bounded(x, k, 30)
                seen = seen * 3 + what
    tl.store(y_ptr + 2 * pid, x)
    tl.store(y_ptr + 2 * pid + 1, seen)


@pytest.mark.ops("early returns", "functions", "while loops", "for loops")
def test_functions_called_in_loops_in_branches_return_several_values(run, check):
    x, y = torch.tensor([0, 1, 7, 11, 30, 41]).int(), torch.empty(6, 2).int()
    run(in_loops_kernel, (6,))(x, y, 2)
    rows = []
    for value in x.tolist():
        seen = 0
        for k in range(2):
            while value < 20 * k:
                value = (value + 1 if k % 2 == 0 else value * 2) + 3
                if value > 10:
                    value, what = (30, 1) if value > 30 else (value, 0)
                    seen = seen * 3 + what
        rows.append([value, seen])
    check(y, torch.tensor(rows))


@triton.jit
def with_effects(x, y_ptr, i):
    if tl.sum(x) > 0:
        tl.store(y_ptr + i, x)
        if tl.max(x) > 5:
            return x * 2, tl.sum(x)
        x = x + 1
    elif tl.min(x) < -5:
        return x, tl.min(x)
    tl.store(y_ptr + 8 + i, x)
    return -x, tl.sum(x) * 0


@triton.jit
def blocks_kernel(x_ptr, y_ptr, z_ptr, n):
    i = tl.arange(0, 8)
    total = 0.0
    for k in range(n):
        x = tl.load(x_ptr + k * 8 + i)
        x, value = with_effects(x, y_ptr + k * 16, i)
        total += value
        tl.store(z_ptr + k * 8 + i, x + total)


@pytest.mark.ops("early returns", "functions")
def test_functions_that_return_early_return_blocks_and_store(run, check):
    rows = [[1] * 8, [-2] * 8, [6, -2] + [0] * 6, [-9] + [0] * 7]
    x = torch.tensor(rows).float()
    y, z = torch.zeros(4, 16), torch.empty(4, 8)
    run(blocks_kernel, (1,))(x, y, z, 4)
    stored = torch.zeros(4, 16)
    stored[0, :8], stored[0, 8:], stored[1, 8:], stored[2, :8] = x[0], x[0] + 1, x[1], x[2]
    check(y, stored)
    check(z, torch.stack([-(x[0] + 1), -x[1], x[2] * 2 + 4, x[3] - 5]))


@triton.jit
def program_returns_kernel(x_ptr, y_ptr, n):
    pid = tl.program_id(0)
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + pid * 8 + i)
    if pid < n:
        if tl.sum(x) > 0:
            tl.store(y_ptr + pid * 8 + i, x + 1)
            if pid == 0:
                return
            x = x * 3
        else:
            x = x - 100
    else:
        tl.store(y_ptr + pid * 8 + i, x - 1)
        return
    tl.store(y_ptr + pid * 8 + i, x)


@pytest.mark.ops("early returns", "branches")
def test_a_program_returns_from_branches_in_branches(run, check):
    x, y = torch.tensor([1.0, 2, -3, 4]).repeat_interleave(8).view(4, 8), torch.zeros(4, 8)
    run(program_returns_kernel, (4,))(x, y, 3)
    check(y, torch.stack([x[0] + 1, x[1] * 3, x[2] - 100, x[3] - 1]))


@triton.jit
def larger_magnitude(a, b):
    if tl.abs(a) > tl.abs(b):
        return a
    if tl.abs(a) < tl.abs(b):
        return b
    return tl.maximum(a, b)


@triton.jit
def combining_kernel(x_ptr, y_ptr, z_ptr):
    i, j = tl.arange(0, 4), tl.arange(0, 32)
    x = tl.load(x_ptr + i[:, None] * 32 + j[None, :])
    tl.store(y_ptr + i, tl.reduce(x, 1, larger_magnitude))
    tl.store(y_ptr + 4 + j, tl.reduce(x, 0, larger_magnitude))
    scanned = tl.associative_scan(x, 1, larger_magnitude)
    tl.store(z_ptr + i[:, None] * 32 + j[None, :], scanned)


@pytest.mark.ops("early returns", "reduce", "associative_scan")
@pytest.mark.no_interpreter("it combines whole blocks, which are neither true nor false")
def test_combining_functions_may_return_early(run, check):
    x = torch.randint(-50, 50, (4, 32)).int()
    y, z = torch.empty(36).int(), torch.empty(4, 32).int()

    def largest(block, dim):
        key = block.abs() * 2 + (block > 0)
        return block.gather(dim, key.argmax(dim, keepdim=True)).squeeze(dim)

    run(combining_kernel, (1,))(x, y, z)
    check(y, torch.cat([largest(x, 1), largest(x, 0)]))
    check(z, torch.stack([largest(x[:, : n + 1], 1) for n in range(32)], 1))


@triton.jit
def compared(x, y):
    if x < y:
        return -1
    elif x == y:
        return 0
    else:
        return 1


@triton.jit
def collatz(n, limit):
    steps = n * 0
    if n <= 0:
        return steps, n
    while n != 1 and steps < limit:
        if n % 2 == 0:
            n = n // 2
        else:
            n = n * 3 + 1
        steps += 1
    for _ in range(steps):
        n = n + compared(steps, 10)
    return steps, n


@triton.jit
def mapped_kernel(x_ptr, y_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(a_ptr + i, tl.map_elementwise(compared, x, y))
    steps, last = tl.map_elementwise(collatz, x, tl.full((BLOCK,), 20, tl.int32))
    tl.store(a_ptr + BLOCK + i, steps)
    tl.store(b_ptr + i, last)


@has_map
@pytest.mark.ops("map_elementwise", "early returns")
@pytest.mark.no_interpreter("it has no map_elementwise")
def test_mapped_functions_branch_loop_and_return_early(run, check):
    x, y = torch.arange(-4, 28).int(), torch.randint(-4, 28, (32,)).int()
    a, b = torch.empty(2, 32).int(), torch.empty(32).int()
    run(mapped_kernel, (1,))(x, y, a, b, BLOCK=32)
    check(a[0], torch.sign(x - y))
    steps, last = [], []
    for n in x.tolist():
        count = 0
        while n > 0 and n != 1 and count < 20:
            n, count = (n // 2 if n % 2 == 0 else n * 3 + 1), count + 1
        steps.append(count)
        last.append(n + count * ((count > 10) - (count < 10)))
    check(a[1], torch.tensor(steps))
    check(b, torch.tensor(last))


@triton.jit
def looked_up(pointer, index):
    if index < 0:
        return index
    return tl.load(pointer + index)


@triton.jit
def lookup_kernel(x_ptr, i_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = tl.broadcast_to(x_ptr, (BLOCK,))
    tl.store(y_ptr + i, tl.map_elementwise(looked_up, pointers, tl.load(i_ptr + i)))


@has_map
@pytest.mark.ops("map_elementwise")
@pytest.mark.no_interpreter("it has no map_elementwise")
def test_mapped_functions_load_only_where_control_leads(run, check, fenced):
    index = torch.cat([torch.randperm(24), torch.full((8,), -(2**30))])[torch.randperm(32)].int()
    x, y = fenced(torch.randint(-99, 99, (24,)).int()), torch.empty(32).int()
    run(lookup_kernel, (1,))(x, index, y, BLOCK=32)
    check(y, torch.where(index < 0, index, x[index.clamp_min(0)]))


@triton.jit(noinline=True)
def apart(x, n):
    if n == 0:
        return x
    for k in range(n):
        x = either(x, k)
    if x > 50:
        return x - 50
    return x


@triton.jit
def apart_kernel(x_ptr, y_ptr, n):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid)
    for k in range(n):
        if k != 1:
            x = apart(apart(x, k), pid)
    tl.store(y_ptr + pid, x)


@pytest.mark.ops("noinline functions", "early returns")
def test_functions_that_stay_apart_return_early(run, check):
    def python(x, n):
        if n == 0:
            return x
        for k in range(n):
            x = x + 1 if k == 0 else x * 2
        return x - 50 if x > 50 else x

    x, y = torch.arange(5, 13).int(), torch.empty(8).int()
    run(apart_kernel, (8,))(x, y, 4)
    expected = []
    for pid, value in enumerate(x.tolist()):
        for k in (0, 2, 3):
            value = python(python(value, k), pid)
        expected.append(value)
    check(y, torch.tensor(expected))
