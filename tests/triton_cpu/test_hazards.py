"""Orders that fusing loads, arithmetic and stores into one loop would break.

A kernel reads as if each statement were done for the whole block before the next one begins.
"""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def loaded_before_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x * 0)
    tl.store(y_ptr + i, x)


def test_a_value_outlives_the_store_that_overwrites_its_source(run, check):
    x, y = torch.randn(64), torch.empty(64)
    right = x.clone()
    run(loaded_before_kernel, (1,))(x, y, BLOCK=64)
    check(y, right)
    check(x, torch.zeros(64))


@triton.jit
def loaded_after_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x + 1)
    again = tl.load(x_ptr + i)
    tl.store(x_ptr + (BLOCK - 1 - i), again * 2)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + again)


def test_a_load_sees_the_stores_before_it(run, check):
    x, y = torch.randint(-9, 9, (64,)).float(), torch.empty(64)
    before = x + 1
    run(loaded_after_kernel, (1,))(x, y, BLOCK=64)
    check(x, before.flip(0) * 2)
    check(y, before.flip(0) * 2 + before)


@triton.jit
def reversed_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + (BLOCK - 1 - i), tl.load(x_ptr + i))


def test_a_block_is_reversed_in_place(run, check):
    x = torch.randn(128)
    right = x.flip(0)
    run(reversed_kernel, (1,))(x, BLOCK=128)
    check(x, right)


@triton.jit
def transposed_kernel(x_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(x_ptr + j * N + i, tl.load(x_ptr + i * N + j))


def test_a_square_is_transposed_in_place(run, check):
    x = torch.randn(16, 16)
    right = x.T.clone()
    run(transposed_kernel, (1,))(x, N=16)
    check(x, right)


@triton.jit
def shifted_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.store(x_ptr + i + 1, x, mask=i < n)
    y = tl.load(x_ptr + i + 2, mask=i < n - 1, other=0)
    tl.store(x_ptr + i, y * 2, mask=i < n - 1)


@pytest.mark.parametrize("n", [5, 64, 100])
def test_a_block_moves_over_itself(run, check, n):
    x = torch.randn(n + 2)
    right = x.clone()
    run(shifted_kernel, (1,))(x, n, BLOCK=128)
    right[1 : n + 1] = right[:n].clone()
    right[: n - 1] = right[2 : n + 1].clone() * 2
    check(x, right)


@triton.jit
def two_outputs_kernel(a_ptr, b_ptr, c_ptr, d_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(c_ptr + i, a + b)
    tl.store(d_ptr + i, a * b)
    tl.store(c_ptr + i, tl.load(c_ptr + i) + tl.load(a_ptr + i))


def two_outputs(a, b, c, d):
    a0, b0 = a.clone(), b.clone()
    c.copy_(a0 + b0)
    d.copy_(a0 * b0)
    c.copy_(c.clone() + a.clone())


@pytest.mark.parametrize(
    "places",
    [
        *((0, 64, 128, 192), (0, 0, 128, 192), (0, 64, 0, 64), (0, 64, 64, 0), (0, 0, 0, 0)),
        *((0, 64, 1, 192), (1, 64, 0, 192), (0, 64, 128, 129), (0, 64, 129, 128), (0, 1, 2, 3)),
        *((3, 2, 1, 0), (0, 64, 63, 1), (32, 0, 16, 48)),
    ],
    ids=str,
)
def test_arguments_may_share_memory(run, check, places):
    memory = torch.randint(-9, 9, (300,)).float()
    right = memory.clone()
    run(two_outputs_kernel, (1,))(*(memory[p:] for p in places), BLOCK=64)
    two_outputs(*(right[p : p + 64] for p in places))
    check(memory, right)


@triton.jit
def live_across_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    total = tl.sum(x)
    running = tl.cumsum(x, 0)
    tl.store(x_ptr + i, running)
    later = tl.load(x_ptr + (i + 1) % BLOCK)
    tl.store(x_ptr + i, later - x)
    tl.store(y_ptr + i, total + running * 2)
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i) + tl.max(x))


def test_reductions_and_scans_outlive_stores(run, check):
    x, y = torch.randint(-9, 9, (64,)).int(), torch.empty(2, 64).int()
    before = x.clone()
    run(live_across_kernel, (1,))(x, y, BLOCK=64)
    running = before.cumsum(0)
    after = running.roll(-1) - before
    check(x, after)
    check(y, torch.stack([before.sum() + running * 2, after + before.max()]))


@triton.jit
def same_place_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i // 4, tl.load(y_ptr + i // 4))  # four lanes, one value
    tl.store(x_ptr + 64 + i * 0, i * 0 + 5)
    first = tl.load(x_ptr + i // 8)
    tl.store(x_ptr + 128 + i, first, mask=i % 2 == 0)
    tl.store(x_ptr + 128 + i, first + 1, mask=i % 2 == 1)
    tl.store(x_ptr + 128 + i, tl.load(x_ptr + 128 + i) * 2)


def test_lanes_store_one_value_to_one_place(run, check):
    x, y = torch.zeros(192).int(), torch.randint(0, 99, (16,)).int()
    run(same_place_kernel, (1,))(x, y, BLOCK=64)
    i = torch.arange(64)
    right = torch.zeros(192).int()
    right[:16], right[64] = y, 5
    right[128:] = (y[i // 8] + i % 2) * 2
    check(x, right)


@triton.jit
def any_lane_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i // 8, i)


@pytest.mark.no_interpreter("which lane wins is nobody's promise")
def test_one_of_several_lanes_wins(run, check):
    x = torch.full((8,), -1).int()
    run(any_lane_kernel, (1,))(x, BLOCK=64)
    check(x // 8, torch.arange(8))


@triton.jit
def atomics_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    before = tl.load(x_ptr + i % 4)
    old = tl.atomic_add(x_ptr + i % 4, 1)
    after = tl.load(x_ptr + i % 4)
    tl.store(y_ptr + i, after - before)
    tl.store(y_ptr + BLOCK + i, (old >= before) & (old < after))
    tl.store(x_ptr + i % 4, before)
    unused = tl.atomic_max(x_ptr + 4 + i, i)  # done once, though nobody asks for the result
    tl.store(y_ptr + 2 * BLOCK + i, tl.load(x_ptr + 4 + i) + unused * 0)
    twice = old + old
    tl.store(y_ptr + 3 * BLOCK + i, twice - old - old)


def test_loads_after_atomics_see_all_of_them(run, check):
    x = torch.cat([torch.tensor([5, 6, 7, 8]), torch.full((32,), 10)]).int()
    y = torch.empty(4, 32).int()
    run(atomics_kernel, (1,))(x, y, BLOCK=32)
    i = torch.arange(32)
    high = i.clamp_min(10)
    check(y, torch.stack([torch.full_like(i, 8), torch.ones_like(i), high, torch.zeros_like(i)]))
    check(x, torch.cat([torch.tensor([5, 6, 7, 8]), high]))


@triton.jit
def atomics_of_loaded_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    turned = BLOCK - 1 - i
    tl.atomic_add(x_ptr + i, tl.load(x_ptr + turned))
    first, _ = tl.split(tl.join(tl.load(x_ptr + turned), i))
    tl.atomic_add(x_ptr + i, first + 0)  # Triton's interpreter takes no views here
    row = tl.trans(tl.load(x_ptr + turned)[None, :])
    tl.atomic_max(x_ptr + i[:, None], row + 0)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_an_atomic_operation_takes_what_was_loaded_before_it(run, check):
    x, y = torch.randint(-99, 99, (32,)).int(), torch.empty(32).int()
    right = x + x.flip(0)
    right = right + right.flip(0)
    right = torch.maximum(right, right.flip(0))
    run(atomics_of_loaded_kernel, (1,))(x, y, BLOCK=32)
    check(x, right)
    check(y, right)


@triton.jit
def atomics_in_loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for k in range(n):
        old = tl.atomic_add(x_ptr + i, k)
        if k % 2 == 0:
            total += old
        tl.store(y_ptr + i, total)


def test_an_atomic_operation_is_done_once_a_trip(run, check):
    x, y = torch.zeros(16).int(), torch.empty(16).int()
    run(atomics_in_loop_kernel, (1,))(x, y, 7, BLOCK=16)
    check(x, torch.full((16,), 21))
    check(y, torch.full((16,), 0 + 1 + 6 + 15))


@triton.jit
def once_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr)  # a scalar, before and after it is overwritten
    tl.store(x_ptr, x + 1)
    y = tl.load(x_ptr)
    for k in range(n):
        tl.store(x_ptr, tl.load(x_ptr) * 2 + k)
    tl.store(y_ptr + i, x * 10000 + y * 100 + tl.load(x_ptr) + i * 0)
    if x > 2:
        tl.store(x_ptr, -x)
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr) + i)


def test_scalars_in_memory_change_in_order(run, check):
    x, y = torch.tensor([3]).int(), torch.empty(2, 16).int()
    run(once_kernel, (1,))(x, y, 3, BLOCK=16)
    check(x, torch.tensor([-3]))
    after = ((4 * 2 + 0) * 2 + 1) * 2 + 2
    check(y, torch.stack([torch.full((16,), 30000 + 400 + after), torch.arange(16) - 3]))


@triton.jit
def masks_change_kernel(m_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    keep = tl.load(m_ptr + i) > 0
    tl.store(m_ptr + i, 0)
    x = tl.load(x_ptr + i, mask=keep, other=-1)
    tl.store(x_ptr + i, x + 1, mask=keep)
    tl.store(m_ptr + i, x, mask=tl.load(m_ptr + i) == 0)


def test_a_mask_from_memory_is_read_once(run, check):
    m, x = torch.randint(0, 2, (32,)).int(), torch.randint(0, 99, (32,)).int()
    keep, before = m > 0, x.clone()
    run(masks_change_kernel, (1,))(m, x, BLOCK=32)
    check(x, torch.where(keep, before + 1, before))
    check(m, torch.where(keep, before, -1))


@triton.jit
def dtypes_meet_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)  # float32 over the memory of y, int8
    tl.store(y_ptr + i, i)
    tl.store(x_ptr + BLOCK + i, x)
    tl.store(x_ptr + 2 * BLOCK + i, tl.load(x_ptr + i))


def test_one_memory_is_read_in_two_dtypes(run, check):
    memory = torch.randn(96)
    right = memory.clone()
    run(dtypes_meet_kernel, (1,))(memory, memory.view(torch.int8), BLOCK=32)
    right[32:64] = right[:32]
    right.view(torch.int8)[:32] = torch.arange(32)
    right[64:] = right[:32]
    check(memory, right)


@triton.jit
def programs_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scratch = y_ptr + n + i
    tl.store(scratch, tl.load(x_ptr + i) * 2)
    total = tl.sum(tl.load(scratch))
    tl.store(scratch, tl.load(scratch) + total)
    tl.store(y_ptr + i, tl.flip(tl.load(scratch), 0))


def test_programs_keep_their_scratch_apart(run, check):
    x, y = torch.randint(-9, 9, (40, 16)).float(), torch.empty(2, 40, 16)
    run(programs_kernel, (40,))(x, y, 640, BLOCK=16)
    scratch = 2 * x + 2 * x.sum(1, keepdim=True)
    check(y, torch.stack([scratch.flip(1), scratch]))
