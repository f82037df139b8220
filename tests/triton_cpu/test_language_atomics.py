"""Atomic operations: what they leave in memory, what they return, and many programs at once."""

import pytest
import torch
import triton
import triton.language as tl

FLOATS = [torch.float32, torch.float64]


@triton.jit
def integers_kernel(x_ptr, v_ptr, m_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v, m = tl.load(v_ptr + i), tl.load(m_ptr + i) != 0
    tl.store(old_ptr + i, tl.atomic_add(x_ptr + i, v, mask=m), mask=m)
    x_ptr += BLOCK
    tl.store(old_ptr + BLOCK + i, tl.atomic_max(x_ptr + i, v))
    x_ptr += BLOCK
    tl.store(old_ptr + 2 * BLOCK + i, tl.atomic_min(x_ptr + i, v))
    x_ptr += BLOCK
    tl.store(old_ptr + 3 * BLOCK + i, tl.atomic_and(x_ptr + i, v))
    x_ptr += BLOCK
    tl.store(old_ptr + 4 * BLOCK + i, tl.atomic_or(x_ptr + i, v))
    x_ptr += BLOCK
    tl.store(old_ptr + 5 * BLOCK + i, tl.atomic_xor(x_ptr + i, v))
    x_ptr += BLOCK
    tl.store(old_ptr + 6 * BLOCK + i, tl.atomic_xchg(x_ptr + i, v, mask=m), mask=m)


@pytest.mark.ops(
    *("atomic_add", "atomic_max", "atomic_min", "atomic_and", "atomic_or"),
    *("atomic_xor", "atomic_xchg"),
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.uint64], ids=str)
def test_integers_change_and_their_old_values_return(run, check, dtype):
    bits, signed = 8 * dtype.itemsize, dtype in (torch.int32, torch.int64)
    kin = {32: torch.int32, 64: torch.int64}[bits]
    x, v = (torch.randint(-(2**63), 2**63 - 1, size).to(kin) for size in ((7, 16), (16,)))
    m, old = torch.randint(0, 2, (16,)).int(), torch.zeros(7, 16, dtype=kin)
    before = x.clone()
    run(integers_kernel, (1,))(x.view(dtype), v.view(dtype), m, old.view(dtype), BLOCK=16)
    m, flip = m.bool(), 0 if signed else -(2 ** (bits - 1))  # makes signed order unsigned
    high = torch.maximum(before[1] ^ flip, v ^ flip) ^ flip
    low = torch.minimum(before[2] ^ flip, v ^ flip) ^ flip
    right = [torch.where(m, before[0] + v, before[0]), high, low, before[3] & v, before[4] | v]
    check(x, torch.stack([*right, before[5] ^ v, torch.where(m, v, before[6])]))
    before[0][~m], before[6][~m] = 0, 0
    check(old, before)


@triton.jit
def floats_kernel(x_ptr, v_ptr, m_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v, m = tl.load(v_ptr + i), tl.load(m_ptr + i) != 0
    tl.store(old_ptr + i, tl.atomic_add(x_ptr + i, v, mask=m), mask=m)


@pytest.mark.ops("atomic_add")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_added_and_their_old_values_return(run, check, dtype):
    x, v = torch.randn(16, dtype=dtype), torch.randn(16, dtype=dtype)
    m, old, before = torch.randint(0, 2, (16,)).int(), torch.zeros(16, dtype=dtype), x.clone()
    run(floats_kernel, (1,))(x, v, m, old, BLOCK=16)
    check(x, torch.where(m.bool(), before + v, before))
    check(old, torch.where(m.bool(), before, 0))


@triton.jit
def extremes_kernel(x_ptr, v_ptr, m_ptr, old_ptr, best_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v, m = tl.load(v_ptr + i), tl.load(m_ptr + i) != 0
    tl.store(old_ptr + i, tl.atomic_max(x_ptr + i, v))
    tl.store(old_ptr + BLOCK + i, tl.atomic_min(x_ptr + BLOCK + i, v, mask=m), mask=m)
    tl.store(old_ptr + 2 * BLOCK + i, tl.atomic_xchg(x_ptr + 2 * BLOCK + i, v))
    tl.atomic_max(best_ptr, tl.max(v))
    tl.atomic_min(best_ptr + 1, tl.min(v))


@pytest.mark.ops("atomic_max", "atomic_min", "atomic_xchg")
@pytest.mark.no_interpreter("it refuses them")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extremes_and_exchanges_of_floats(run, check, dtype):
    x, v = torch.randn(3, 16, dtype=dtype), torch.randn(16, dtype=dtype)
    m, old, before = torch.randint(0, 2, (16,)).int(), torch.zeros(3, 16, dtype=dtype), x.clone()
    best = torch.tensor([-0.001, 0.001], dtype=dtype)
    run(extremes_kernel, (1,))(x, v, m, old, best, BLOCK=16)
    m = m.bool()
    low = torch.where(m, torch.minimum(before[1], v), before[1])
    check(x, torch.stack([torch.maximum(before[0], v), low, v]))
    check(old, torch.stack([before[0], torch.where(m, before[1], 0), before[2]]))
    check(best, torch.stack([v.max().clamp_min(-0.001), v.min().clamp_max(0.001)]))


@triton.jit
def halves_kernel(x_ptr, v_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + i % 4, tl.load(v_ptr + tl.program_id(0) * BLOCK + i))


@pytest.mark.ops("atomic_add")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.no_interpreter("it adds the bits")),
    ],
    ids=str,
)
def test_half_precision_is_added(run, check, dtype):
    x, v = torch.zeros(4).to(dtype), torch.randint(-2, 3, (4, 16)).to(dtype)  # small: exact
    run(halves_kernel, (4,))(x, v, BLOCK=16)
    check(x, v.double().view(-1, 4).sum(0))


@triton.jit
def scalars_kernel(x_ptr, order_ptr):
    pid = tl.program_id(0)
    ticket = tl.atomic_add(x_ptr, 1)
    tl.store(order_ptr + ticket, pid)  # every ticket is drawn once
    tl.atomic_max(x_ptr + 1, pid * 7 % 64)
    tl.atomic_min(x_ptr + 2, -pid)
    tl.atomic_or(x_ptr + 3, 1 << (pid % 31))
    tl.atomic_add(x_ptr + 4, pid, mask=pid % 2 == 0)
    tl.atomic_xor(x_ptr + 5, pid)


@pytest.mark.ops("atomic_add", "atomic_max", "atomic_min", "atomic_or", "atomic_xor")
def test_many_programs_meet_at_one_address(run, check):
    n = 500
    x, order = torch.zeros(6).int(), torch.full((n,), -1).int()
    run(scalars_kernel, (n,))(x, order)
    xor = 0
    for pid in range(n):
        xor ^= pid
    check(x, torch.tensor([n, 63, 1 - n, 2**31 - 1, sum(range(0, n, 2)), xor]).int())
    check(order.sort()[0], torch.arange(n))


@triton.jit
def histogram_kernel(x_ptr, count_ptr, weight_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    bin = (x * 2654435761 >> 7) % BINS
    tl.atomic_add(count_ptr + bin, 1, mask=i < n)
    tl.atomic_add(weight_ptr + bin, x.to(tl.float32), mask=i < n)


@pytest.mark.ops("atomic_add")
def test_lanes_of_one_program_meet_at_one_address(run, check):
    x = torch.randint(0, 1000, (5000,))
    count, weight = torch.zeros(13).int(), torch.zeros(13)
    run(histogram_kernel, (20,))(x, count, weight, 5000, BINS=13, BLOCK=256)
    bins = (x * 2654435761 >> 7) % 13
    check(count, torch.bincount(bins, minlength=13))
    check(weight, torch.bincount(bins, x.double(), minlength=13), ulp=1)  # below 2**24: exact


@triton.jit
def swap_kernel(x_ptr, old_ptr):
    pid = tl.program_id(0)
    expected, new = tl.full((), 1, x_ptr.dtype.element_ty), (100 + pid).to(x_ptr.dtype.element_ty)
    tl.store(old_ptr + pid, tl.atomic_cas(x_ptr + pid, expected, new))


@pytest.mark.ops("atomic_cas")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_value_is_swapped_where_it_was_expected(run, check, dtype):
    x, old = torch.tensor([1, 0, 1, 2], dtype=dtype), torch.empty(4, dtype=dtype)
    run(swap_kernel, (4,))(x, old)
    check(x, torch.tensor([100, 0, 102, 2]))
    check(old, torch.tensor([1, 0, 1, 2]))


@triton.jit
def swapped_block_kernel(x_ptr, v_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    expected = tl.zeros((BLOCK,), tl.int32)
    tl.store(old_ptr + i, tl.atomic_cas(x_ptr + i, expected, tl.load(v_ptr + i)))


@pytest.mark.ops("atomic_cas")
def test_blocks_of_values_are_swapped(run, check):
    x, v, old = torch.randint(0, 2, (16,)).int(), torch.arange(16).int(), torch.empty(16).int()
    before = x.clone()
    run(swapped_block_kernel, (1,))(x, v, old, BLOCK=16)
    check(x, torch.where(before == 0, v, before))
    check(old, before)


@triton.jit
def locked_kernel(lock_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(x_ptr + i, tl.load(x_ptr + i) * 3 + 1)  # torn unless one program is here
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@pytest.mark.ops("atomic_cas", "atomic_xchg", "debug_barrier")
def test_a_lock_lets_one_program_in(run, check):
    lock, x = torch.zeros(1).int(), torch.arange(16).int()
    right = x.clone()
    for _ in range(200):
        right = right * 3 + 1
    run(locked_kernel, (200,))(lock, x, BLOCK=16)
    check(x, right)
    check(lock, torch.zeros(1))


@triton.jit
def semantics_kernel(x_ptr, y_ptr):
    pid = tl.program_id(0)
    tl.atomic_add(x_ptr, 1, sem="relaxed")
    tl.atomic_add(x_ptr, 1, sem="acquire", scope="cta")
    tl.atomic_add(x_ptr, 1, sem="release", scope="sys")
    seen = tl.atomic_add(x_ptr, 1, sem="acq_rel", scope="gpu")
    tl.atomic_max(y_ptr, seen + pid * 0)


@pytest.mark.ops("atomic_add")
def test_every_order_of_memory_is_accepted(run, check):
    x, y = torch.zeros(1).int(), torch.zeros(1).int()
    run(semantics_kernel, (50,))(x, y)
    check(x, torch.tensor([200]))
    check(y, torch.tensor([199]))


@triton.jit
def split_sum_kernel(
    x_ptr, partial_ptr, count_ptr, y_ptr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    i, p = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    tl.store(partial_ptr + pid, tl.sum(tl.load(x_ptr + pid * BLOCK + i)))
    done = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if done == PARTS - 1:  # the last one adds what the others left
        tl.store(y_ptr, tl.sum(tl.load(partial_ptr + p, volatile=True)))


@pytest.mark.ops("atomic_add")
def test_the_last_program_sees_what_the_others_stored(run, check):
    x, y = torch.randint(-99, 99, (64, 128)).float(), torch.zeros(1)
    run(split_sum_kernel, (64,))(x, torch.zeros(64), torch.zeros(1).int(), y, PARTS=64, BLOCK=128)
    check(y, x.sum()[None])


@triton.jit
def volatile_kernel(flag_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        while tl.load(flag_ptr, volatile=True) == 0:
            pass
        while tl.min(tl.load(flag_ptr + i, volatile=True)) == 0:
            pass
        tl.store(y_ptr + i, tl.load(x_ptr + i))
    else:
        tl.store(x_ptr + i, i)
        tl.atomic_xchg(flag_ptr + i, 1)


@pytest.mark.ops("load")
@pytest.mark.no_interpreter("it runs one program after another")
def test_volatile_loads_see_what_another_program_writes(run, check, threads):
    threads(2)
    flag, x, y = torch.zeros(3, 16).int()
    run(volatile_kernel, (2,))(flag, x, y, BLOCK=16)
    check(y, torch.arange(16))
