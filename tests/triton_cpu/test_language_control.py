"""Control flow: loops, branches, what they carry, and functions that are called."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def range_kernel(x_ptr, y_ptr, start, stop, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(start, stop, step):
        total += x * k
    tl.store(y_ptr + i, total)
    count = 0
    for _ in range(stop):
        count += 1
    tl.store(y_ptr + BLOCK + i, x + count)
    for k in range(stop, start, -2):
        total = total * 0.5 + k
    tl.store(y_ptr + 2 * BLOCK + i, total)


@pytest.mark.ops("for loops", "range")
@pytest.mark.parametrize("bounds", [(0, 5, 1), (3, 20, 4), (4, 4, 1), (7, 2, 3)], ids=str)
def test_loops_count_as_in_python(run, check, bounds):
    start, stop, step = bounds
    x, y = torch.randn(16), torch.empty(3, 16)
    run(range_kernel, (1,))(x, y, start, stop, step, BLOCK=16)
    total = x.double() * sum(range(start, stop, step))
    check(y[0], total, atol=1e-4)
    check(y[1], x + len(range(stop)))
    for k in range(stop, start, -2):
        total = total * 0.5 + k
    check(y[2], total, atol=1e-4)


@triton.jit
def hinted_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.zeros((BLOCK,), tl.int32)
    for k in tl.range(n):
        a += tl.load(x_ptr + k * BLOCK + i)
    tl.store(y_ptr + i, a)
    for k in tl.range(0, n, 2, num_stages=3):
        a += tl.load(x_ptr + k * BLOCK + i)
    tl.store(y_ptr + BLOCK + i, a)
    for k in tl.range(0, n, loop_unroll_factor=4):
        a = a * 3 + tl.load(x_ptr + k * BLOCK + i)
    tl.store(y_ptr + 2 * BLOCK + i, a)
    for k in tl.range(n, flatten=True, disallow_acc_multi_buffer=True, warp_specialize=True):
        for j in tl.range(k, n):
            a = a * 5 + j
    tl.store(y_ptr + 3 * BLOCK + i, a)


@pytest.mark.ops("range")
@pytest.mark.parametrize("n", [0, 1, 7])
def test_hints_to_a_loop_change_nothing(run, check, n):
    x, y = torch.randint(-99, 99, (7, 16)).int(), torch.empty(4, 16).int()
    run(hinted_kernel, (1,))(x, y, n, BLOCK=16)
    rows, a = [], x[:n].sum(0).int()
    rows.append(a)
    a = a + x[:n:2].sum(0).int()
    rows.append(a)
    for k in range(n):
        a = a * 3 + x[k]
    rows.append(a)
    for k in range(n):
        for j in range(k, n):
            a = a * 5 + j
    check(y, torch.stack([*rows, a]))


@triton.jit
def unrolled_kernel(x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    for k in tl.static_range(N):
        if k % 2 == 0:
            a += tl.load(x_ptr + (k + 1) * BLOCK + i)
        else:
            a -= k
    for k in tl.static_range(1, 2 * N, 3):
        a += 10 * k
    tl.store(y_ptr + i, a)


@pytest.mark.ops("static_range")
def test_unrolled_loops(run, check):
    x, y = torch.randint(-9, 9, (8, 16)).float(), torch.empty(16)
    run(unrolled_kernel, (1,))(x, y, N=7, BLOCK=16)
    check(y, x[0] + x[1] + x[3] + x[5] + x[7] - 9 + 10 * sum(range(1, 14, 3)))


@triton.jit
def pointers_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_ptrs, y_ptrs = x_ptr + i, y_ptr + i
    carried = tl.zeros((BLOCK,), tl.float32)
    previous = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        x = tl.load(x_ptrs)
        tl.store(y_ptrs, carried * 2 + previous)
        previous = carried
        carried = x
        x_ptrs += BLOCK
        y_ptrs += BLOCK
    tl.store(y_ptrs, carried)
    for _ in range(n):
        y_ptrs -= BLOCK
        tl.store(y_ptrs, tl.load(y_ptrs) + 1)


@pytest.mark.ops("for loops", "range", "load", "store")
def test_loops_carry_tensors_and_pointers(run, check):
    x, y = torch.randint(-9, 9, (6, 16)).float(), torch.zeros(7, 16)
    run(pointers_kernel, (1,))(x, y, 6, BLOCK=16)
    nothing = torch.zeros(1, 16)
    now, before = torch.cat([nothing, x[:-1]]), torch.cat([nothing, nothing, x[:-2]])
    check(y, torch.cat([now * 2 + before + 1, x[-1:]]))


@triton.jit
def uneven_pointers_kernel(x_ptr, step_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    ptrs = x_ptr + i
    offset = 0
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(n):
        acc += tl.load(ptrs) * (k + 1)
        step = tl.load(step_ptr + k)
        ptrs += step * BLOCK
        offset += step
        if k % 2 == 1:
            ptrs += BLOCK
            offset += 1
    tl.store(y_ptr + i, acc)
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + offset * BLOCK + i))


@pytest.mark.ops("range", "load")
def test_a_carried_pointer_may_move_by_data(run, check):
    x, steps = torch.randint(-9, 9, (20, 16)).float(), torch.randint(0, 3, (6,), dtype=torch.int32)
    y = torch.empty(2, 16)
    run(uneven_pointers_kernel, (1,))(x, steps, y, 6, BLOCK=16)
    at, acc = 0, torch.zeros(16)
    for k in range(6):
        acc += x[at] * (k + 1)
        at += int(steps[k]) + k % 2
    check(y, torch.stack([acc, x[at]]))


@triton.jit
def nested_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    outer = tl.zeros((BLOCK,), tl.int32)
    for m in range(M):
        inner = outer // 2
        last = m
        for n in range(m, N):
            x = tl.load(x_ptr + (m * N + n) * BLOCK + i)
            if n % 3 == 0:
                inner += x
            elif n % 3 == 1:
                inner -= 2 * x
                last = n
            else:
                inner = inner ^ x
        outer += inner + last
        tl.store(y_ptr + m * BLOCK + i, outer)


@pytest.mark.ops("for loops", "branches", "range")
def test_loops_and_branches_nest(run, check):
    M, N = 4, 7
    x, y = torch.randint(0, 99, (M, N, 16)).int(), torch.empty(M, 16).int()
    run(nested_kernel, (1,))(x, y, M, N, BLOCK=16)
    outer, rows = torch.zeros(16).int(), []
    for m in range(M):
        inner, last = torch.div(outer, 2, rounding_mode="trunc"), m
        for n in range(m, N):
            if n % 3 == 0:
                inner = inner + x[m, n]
            elif n % 3 == 1:
                inner, last = inner - 2 * x[m, n], n
            else:
                inner = inner ^ x[m, n]
        outer = outer + inner + last
        rows.append(outer)
    check(y, torch.stack(rows))


@triton.jit
def while_kernel(x_ptr, y_ptr, n):
    target = tl.load(y_ptr + tl.program_id(0))
    low = 0
    high = n
    while low < high:
        middle = (low + high) // 2
        if tl.load(x_ptr + middle) < target:
            low = middle + 1
        else:
            high = middle
    tl.store(y_ptr + tl.program_id(0), low.to(tl.float32))


@pytest.mark.ops("while loops")
@pytest.mark.no_interpreter("it leaves a Python number where the loop does not run")
def test_a_while_loop_searches(run, check):
    x, y = torch.randn(1000).sort()[0], torch.randn(64)
    right = torch.searchsorted(x, y).float()
    run(while_kernel, (64,))(x, y, 1000)
    check(y, right)


@triton.jit
def tensors_in_while_kernel(x_ptr, y_ptr, limit, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    steps = 0
    while tl.max(x) > limit:
        x = tl.where(x % 2 == 0, x // 2, x - 1)
        steps += 1
    tl.store(y_ptr + i, x)
    tl.store(y_ptr + BLOCK, steps)
    while (steps > 0) & (limit > 0):
        steps -= 3
    tl.store(y_ptr + BLOCK + 1, steps)


@pytest.mark.ops("while loops")
def test_a_while_loop_carries_tensors(run, check):
    x, y = torch.randint(0, 10**6, (16,)).int(), torch.empty(18).int()
    run(tensors_in_while_kernel, (1,))(x, y, 50, BLOCK=16)
    steps = 0
    while x.max() > 50:
        x, steps = torch.where(x % 2 == 0, x // 2, x - 1), steps + 1
    left = steps - 3 * -(-steps // 3)
    check(y, torch.cat([x, torch.tensor([steps, left])]))


@triton.jit
def annotated_while_kernel(y_ptr, n):
    k = 0
    while tl.condition(k * k < n, disable_licm=True):
        k += 1
    tl.store(y_ptr, k)


@pytest.mark.ops("condition")
@pytest.mark.skipif(not hasattr(tl, "condition"), reason="not in this Triton")
@pytest.mark.no_interpreter("it takes any object for true")
def test_a_while_loop_with_hints(run, check):
    y = torch.empty(1, dtype=torch.int32)
    run(annotated_while_kernel, (1,))(y, 50)
    check(y, torch.tensor([8]))


@triton.jit
def branches_kernel(x_ptr, y_ptr, n, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    total = tl.sum(x)
    if total > 0:
        x = x * 2
        scale = 3.0
    elif pid == n:
        x = x - 5
        scale = 1.0
    else:
        scale = total
    if FLAG:
        x += 1
    elif n > 100:
        x -= 1
    if pid % 2 == 0:
        if total < -1:
            x = tl.abs(x)
        tl.store(y_ptr + i, x)
    else:
        tl.store(y_ptr + i, x * scale)
    scale2 = 1.0 if pid > 2 else 2.0
    tl.store(y_ptr + i, tl.load(y_ptr + i) * scale2)


@pytest.mark.ops("branches")
@pytest.mark.parametrize("flag", [True, False])
def test_branches_choose_values_and_stores(run, check, flag):
    x, y = torch.randint(-9, 9, (8, 16)).float(), torch.empty(8, 16)
    run(branches_kernel, (8,))(x, y, 3, FLAG=flag, BLOCK=16)
    rows = []
    for pid, row in enumerate(x):
        total = row.sum()
        if total > 0:
            row, scale = row * 2, 3.0
        elif pid == 3:
            row, scale = row - 5, 1.0
        else:
            scale = total
        row = row + 1 if flag else row
        if pid % 2 == 0:
            row = row.abs() if total < -1 else row
        else:
            row = row * scale
        rows.append(row * (1.0 if pid > 2 else 2.0))
    check(y, torch.stack(rows))


@triton.jit
def chosen_pointer_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if pid % 3 == 0:
        ptr = a_ptr + pid * BLOCK
    else:
        ptr = b_ptr
    tl.store(y_ptr + pid * BLOCK + i, tl.load(ptr + i))


@pytest.mark.ops("branches")
def test_branches_choose_pointers(run, check):
    a, b, y = torch.randn(4, 16), torch.randn(16), torch.empty(4, 16)
    run(chosen_pointer_kernel, (4,))(a, b, y, BLOCK=16)
    check(y, torch.stack([a[0], b, b, a[3]]))


@triton.jit
def early_return_kernel(x_ptr, y_ptr, n):
    pid = tl.program_id(0)
    if pid >= n:
        return
    x = tl.load(x_ptr + pid)
    if x < 0:
        tl.store(y_ptr + pid, -1.0)
        return
    tl.store(y_ptr + pid, tl.sqrt(x))


@pytest.mark.ops("early returns")
def test_a_program_may_return_early(run, check):
    x, y = torch.tensor([4.0, -1.0, 9.0, 16.0, 25.0]), torch.zeros(5)
    run(early_return_kernel, (5,))(x, y, 4)
    check(y, torch.tensor([2.0, -1.0, 3.0, 4.0, 0.0]))


@triton.jit
def sign(x):
    if x > 0:
        return 1
    elif x < 0:
        return -1
    return 0


@triton.jit
def pair(x, y, scale: tl.constexpr = 2):
    return x * scale + y, x - y


@triton.jit
def called_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    a, b = pair(x, i)
    c, d = pair(a, b, scale=5)
    tl.store(y_ptr + i, c)
    tl.store(y_ptr + BLOCK + i, d)
    tl.store(y_ptr + 2 * BLOCK + i, sign(tl.load(x_ptr)) + 10 * sign(tl.load(x_ptr + 1)))


@pytest.mark.ops("functions", "early returns")
def test_functions_are_inlined(run, check):
    x, y = torch.tensor([-3, 5, *range(14)]).int(), torch.empty(3, 16).int()
    run(called_kernel, (1,))(x, y, BLOCK=16)
    i = torch.arange(16)
    a, b = x * 2 + i, x - i
    check(y, torch.stack([a * 5 + b, a - b, torch.full_like(a, 9)]))


@triton.jit(noinline=True)
def apart(x, n):
    total = x
    for k in range(n):
        total = total * 2 + k
    return total


@triton.jit(noinline=True)
def apart_pair(x_ptr, offset, value):
    old = tl.load(x_ptr + offset)
    tl.store(x_ptr + offset, old + value)
    return old, old * value


@triton.jit
def noinline_kernel(x_ptr, y_ptr):
    pid = tl.program_id(0)
    old, product = apart_pair(x_ptr, pid, pid + 1)
    tl.store(y_ptr + pid, apart(old, 3) + product)
    tl.store(y_ptr + 4 + pid, apart(apart(pid, 2), 1))


@pytest.mark.ops("noinline functions")
def test_functions_may_stay_apart(run, check):
    x, y = torch.tensor([5, 6, 7, 8]).int(), torch.empty(8).int()
    before = x.clone()
    run(noinline_kernel, (4,))(x, y)
    pid = torch.arange(4).int()
    check(x, before + pid + 1)
    # apart(x, 3) = 8 x + 4; apart(x, 2) = 4 x + 1; apart(x, 1) = 2 x
    first = 8 * before + 4 + before * (pid + 1)
    check(y, torch.cat([first, 2 * (4 * pid + 1)]))


@triton.jit
def factorial(n: tl.constexpr):
    if n <= 1:
        return 1
    else:
        return n * factorial(n - 1)


@triton.jit
def recursive_kernel(y_ptr):
    tl.store(y_ptr, factorial(6))


@pytest.mark.ops("functions")
@pytest.mark.no_interpreter("it does not decide by constants alone")
def test_a_function_may_call_itself_on_constants(run, check):
    y = torch.empty(1).int()
    run(recursive_kernel, (1,))(y)
    check(y, torch.tensor([720]))


@triton.jit
def short_circuit_kernel(x_ptr, y_ptr, n):
    i = tl.program_id(0)
    if i < n and tl.load(x_ptr + i, mask=i < n, other=0) > 0:
        tl.store(y_ptr + i, 1)
    if i >= n or i == 0:
        tl.store(y_ptr + i, 2)
    if not (i < n):
        tl.store(y_ptr + i, tl.load(y_ptr + i) + 10)


@pytest.mark.ops("branches")
def test_conditions_are_joined(run, check):
    x, y = torch.tensor([5, -5, 5, 5]).int(), torch.zeros(4).int()
    run(short_circuit_kernel, (4,))(x, y, 3)
    check(y, torch.tensor([2, 0, 1, 12]))
