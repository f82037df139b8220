"""Atomic loads and stores, and programs that wait for one another: new in Triton 3.9."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="new in Triton 3.9")
DTYPES = [torch.bool, torch.int8, torch.int64, torch.bfloat16, torch.float64]
ONE_AFTER_ANOTHER = pytest.mark.no_interpreter("it runs one program after another")


@triton.jit
def copies_kernel(x_ptr, m_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = tl.load(m_ptr + i) != 0
    tl.atomic_store(y_ptr + i, tl.atomic_load(x_ptr + i), mask=m)
    tl.store(y_ptr + BLOCK + i, tl.atomic_load(x_ptr + i, mask=m), mask=m)
    tl.atomic_store(y_ptr + 2 * BLOCK + i, tl.atomic_load(x_ptr + i, sem="relaxed"), sem="relaxed")
    first = tl.atomic_load(x_ptr, scope="sys")
    tl.atomic_store(y_ptr + 3 * BLOCK, first, scope="cta")
    tl.atomic_store(y_ptr + 3 * BLOCK + 1, first, mask=first != first)
    tl.atomic_store(y_ptr + 3 * BLOCK + 2, first, mask=first == first)


@pytest.mark.ops("atomic_load", "atomic_store")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_loaded_and_stored(run, check, dtype):
    x, m = torch.randint(-99, 99, (16,)).to(dtype), torch.randint(0, 2, (16,)).to(torch.int8)
    y = torch.zeros(51, dtype=dtype)
    run(copies_kernel, (1,))(x, m, y, BLOCK=16)
    masked = torch.where(m.bool(), x, 0)
    check(y, torch.cat([masked, masked, x, x[:1], torch.zeros(1), x[:1]]).to(dtype))


@triton.jit
def reversed_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_store(x_ptr + BLOCK - 1 - i, tl.load(x_ptr + i))
    before = tl.load(x_ptr + i)
    tl.atomic_store(x_ptr + i, before * 2)
    tl.store(y_ptr + i, tl.atomic_load(x_ptr + i) - before)


@pytest.mark.ops("atomic_load", "atomic_store")
def test_a_block_is_loaded_before_it_is_stored(run, check):
    x, y = torch.randn(64), torch.empty(64)
    right = x.flip(0)
    run(reversed_kernel, (1,))(x, y, BLOCK=64)
    check(x, 2 * right)
    check(y, right)


@triton.jit
def found_kernel(x_ptr, expected_ptr, y_ptr, limit, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    expected = tl.load(expected_ptr + i)
    tl.store(y_ptr + i, tl.atomic_poll(x_ptr + i, expected, timeout_ns=limit))
    tl.store(y_ptr + BLOCK + i, tl.atomic_poll(x_ptr + i, 1, timeout_ns=1000, sem="relaxed"))
    tl.store(y_ptr + 2 * BLOCK, tl.atomic_poll(x_ptr, 1, timeout_ns=0))
    tl.atomic_poll(x_ptr + i, 3, timeout_ns=1000)
    last = tl.load(expected_ptr + BLOCK - 1)
    tl.store(y_ptr + 2 * BLOCK + 1, tl.atomic_poll(x_ptr + BLOCK - 1, last))


@pytest.mark.ops("atomic_poll")
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint64], ids=str)
def test_what_is_not_seen_in_time_is_false(run, check, dtype):
    x, expected = torch.randint(0, 3, (2, 16)).to(dtype)
    expected[-1] = x[-1]
    y = torch.full((34,), -1, dtype=torch.int32)
    run(found_kernel, (1,))(x, expected, y, 10_000, BLOCK=16)
    x, expected = x.long(), expected.long()
    check(y, torch.cat([x == expected, x == 1, x[:1] == 1, torch.ones(1)]).int())


@triton.jit
def chain_kernel(x_ptr, y_ptr, total_ptr, done_ptr, BLOCK: tl.constexpr):
    pid, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid * BLOCK + i)
    before = tl.zeros((), x_ptr.dtype.element_ty)
    if pid > 0:
        tl.atomic_poll(done_ptr + pid - 1, 1)
        before = tl.load(total_ptr + pid - 1)
    tl.store(total_ptr + pid, before + tl.sum(x))
    tl.atomic_store(done_ptr + pid, 1)
    tl.store(y_ptr + pid * BLOCK + i, before + tl.cumsum(x, 0))


@pytest.mark.ops("atomic_poll", "atomic_store")
def test_programs_wait_for_earlier_ones(run, check, threads):
    threads(2)
    x, y = torch.randint(-9, 9, (300 * 16,)), torch.empty(300 * 16).long()
    run(chain_kernel, (300,))(x, y, torch.zeros(300).long(), torch.zeros(300).int(), BLOCK=16)
    check(y, x.cumsum(0))


@triton.jit
def meeting_kernel(w_ptr, v_ptr, y_ptr, ready_ptr, done_ptr, K: tl.constexpr, N: tl.constexpr):
    k, n = tl.arange(0, K), tl.arange(0, N)
    w_ptrs = w_ptr + k[:, None] + n * K  # sums along rows: neighbours are one pass
    if tl.program_id(0) == 0:
        tl.atomic_poll(ready_ptr, 1)
        tl.atomic_poll(ready_ptr, 2, timeout_ns=20_000_000)  # never: the other one goes ahead
        tl.store(w_ptrs, tl.load(w_ptrs) * 2)
        tl.atomic_store(done_ptr, 1)
    else:
        v = tl.load(v_ptr + k)[None, :]
        copied = tl.load(w_ptr + n * K)
        tl.atomic_store(ready_ptr, 1)
        before = tl.dot(v, tl.load(w_ptrs))
        seen = tl.atomic_poll(done_ptr, 1)
        after = tl.dot(v, tl.load(w_ptrs))
        tl.store(y_ptr + n, copied)
        tl.store(y_ptr + N + n[None, :], before)
        tl.store(y_ptr + 2 * N + n[None, :], after)
        tl.store(y_ptr + 3 * N + n, seen & (tl.atomic_load(done_ptr) == 1))


@pytest.mark.ops("atomic_poll")
@ONE_AFTER_ANOTHER
def test_nothing_moves_past_a_poll(run, check, threads):
    threads(2)
    w, v = (torch.randint(-9, 9, size).float() for size in ((16, 32), (32,)))
    y, first, product = torch.empty(4, 16), w[:, 0].clone(), w @ v
    ready, done = torch.zeros(2, 1).int()
    run(meeting_kernel, (2,))(w, v, y, ready, done, K=32, N=16)
    check(y, torch.stack([first, product, 2 * product, torch.ones(16)]))


@triton.jit
def hopeless_kernel(done_ptr, y_ptr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.atomic_poll(done_ptr, 1)
    tl.atomic_store(done_ptr, 1)
    tl.store(y_ptr + pid, 1)


@ONE_AFTER_ANOTHER
@pytest.mark.ops("atomic_poll")
def test_waiting_for_nobody_is_an_error(run, check, threads, monkeypatch):
    monkeypatch.setenv("TRITON_CPU_FLAGS", "-DTCPU_POLL_PATIENCE=0.1")
    threads(1)
    line = hopeless_kernel.starting_line_number + 4
    done, y = torch.zeros(1).int(), torch.zeros(2).int()
    with pytest.raises(AssertionError, match=rf":{line}: atomic_poll waits .*\(program 0, 0, 0\)"):
        run(hopeless_kernel, (2,))(done, y)
    check(y, torch.tensor([0, 1]))
    run(hopeless_kernel, (2,))(done, y)
    check(y, torch.tensor([1, 1]))


@triton.jit
def failing_kernel(x_ptr, done_ptr, y_ptr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.device_assert(tl.load(x_ptr) > 0, "no x")
        tl.atomic_store(done_ptr, 1)
    else:
        tl.atomic_poll(done_ptr, 1, timeout_ns=20_000_000_000)
        tl.store(y_ptr, 1)


@ONE_AFTER_ANOTHER
@pytest.mark.ops("atomic_poll")
def test_nobody_waits_for_a_program_that_failed(run, check):
    x, done, y = torch.zeros(3, 1).int()
    with pytest.raises(AssertionError, match="no x"):
        run(failing_kernel, (2,))(x, done, y, debug=True)
    check(y, torch.zeros(1))
