"""Loops, branches and integers that wrap: what fusing their parts would break."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def in_loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    for _ in range(n):
        b = tl.load(x_ptr + i)
        tl.store(x_ptr + i, b + a)
        a = b
    tl.store(y_ptr + i, a)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_memory_carries_values_from_trip_to_trip(run, check, n, shared):
    memory = torch.randint(-9, 9, (80,)).float()
    x, y = memory[:64], memory[1:65] if shared else torch.empty(64)
    right, a = x.clone(), x.clone()
    for _ in range(n):
        right, a = right + a, right
    run(in_loop_kernel, (1,))(x, y, n, BLOCK=64)
    if not shared:
        check(x, right)
    check(y, a)


@triton.jit
def shifted_in_loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in range(n):
        x = tl.load(x_ptr + k * BLOCK + i)
        tl.store(y_ptr + k * BLOCK + i, x * 2 + 1)


def test_an_input_shifted_by_one_against_an_output(run, check):
    memory = torch.randint(-9, 9, (16 * 5 + 1,)).float()
    right = memory.clone()
    run(shifted_in_loop_kernel, (1,))(memory, memory[1:], 5, BLOCK=16)
    for k in range(5):
        right[k * 16 + 1 : k * 16 + 17] = right[k * 16 : k * 16 + 16].clone() * 2 + 1
    check(memory, right)


@triton.jit
def crossed_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c = tl.load(x_ptr + i), tl.load(y_ptr + i), i
    for k in range(n):
        a, b, c = b, a + b, c + (k if k > 1 else 0)
        a, b = tl.flip(b, 0), a
    tl.store(x_ptr + i, a + c)
    tl.store(y_ptr + i, b - c)


@triton.jit
def exchanged_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + i), tl.load(y_ptr + i)
    first = a + 0  # a value of its own: Triton takes two names of one value for one variable
    for _ in range(n):
        older = a
        a = b
        b = older + 2 * b
        first = older
    tl.store(x_ptr + i, a)
    tl.store(y_ptr + i, b)
    tl.store(x_ptr + BLOCK + i, first)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_carried_values_cross(run, check, n):
    x, y = torch.randint(-3, 3, (2, 32)).int(), torch.randint(-3, 3, (32,)).int()
    a, b, first = x[0].clone(), y.clone(), x[0].clone()
    for _ in range(n):
        a, b, first = b, a + 2 * b, a
    run(exchanged_kernel, (1,))(x, y, n, BLOCK=32)
    check(x, torch.stack([a, first]))
    check(y, b)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.no_interpreter("its loop counter is no tensor in a conditional expression")
def test_carried_values_cross_and_turn(run, check, n):
    x, y = torch.randint(-3, 3, (32,)).int(), torch.randint(-3, 3, (32,)).int()
    a, b, c = x.clone(), y.clone(), torch.arange(32)
    for k in range(n):
        a, b, c = b, a + b, c + (k if k > 1 else 0)
        a, b = b.flip(0), a
    run(crossed_kernel, (1,))(x, y, n, BLOCK=32)
    check(x, a + c)
    check(y, b - c)


@triton.jit
def accumulators_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.zeros((N, N), tl.float32)
    before = tl.zeros((N, N), tl.float32)
    for k in range(n):
        x = tl.load(x_ptr + k * N * N + place)
        before = acc  # the accumulator must not be changed under it
        acc = tl.dot(x, x, acc * 0.5, input_precision="ieee")
        acc = tl.where(before > acc, before, acc)
    tl.store(y_ptr + place, acc)
    tl.store(y_ptr + N * N + place, before)


def test_an_accumulator_is_not_changed_under_its_copy(run, check):
    x, y = torch.randint(-2, 3, (4, 16, 16)).float(), torch.empty(2, 16, 16)
    run(accumulators_kernel, (1,))(x, y, 4, N=16)
    acc = before = torch.zeros(16, 16)
    for m in x:
        before = acc
        acc = torch.maximum(before, m @ m + acc * 0.5)
    check(y, torch.stack([acc, before]))


@triton.jit
def two_uses_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + place)
    c = tl.zeros((N, N), tl.float32) + 1.0
    first = tl.dot(x, x, c, input_precision="ieee")
    second = tl.dot(x, tl.trans(x), c, input_precision="ieee")
    tl.store(x_ptr + place, first)
    tl.store(y_ptr + place, second + c + x)


def test_one_accumulator_serves_two_products(run, check):
    x, y = torch.randint(-3, 4, (16, 16)).float(), torch.empty(16, 16)
    before = x.clone()
    run(two_uses_kernel, (1,))(x, y, N=16)
    check(x, before @ before + 1)
    check(y, before @ before.T + 2 + before)


@triton.jit
def chosen_blocks_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, o_ptr, scale, S, T,
    BLOCK: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    g, d = tl.arange(0, G), tl.arange(0, D)
    q = tl.load(q_ptr + (t * G + g[:, None]) * D + d[None, :])
    best = tl.full((G,), float("-inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    acc = tl.zeros((G, D), tl.float32)
    for s in range(S):
        block = tl.load(index_ptr + t * S + s)
        if block >= 0:
            row = block * BLOCK + tl.arange(0, BLOCK)
            seen = row <= t
            k = tl.load(k_ptr + row[None, :] * D + d[:, None], mask=seen[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new = tl.maximum(best, tl.max(scores, 1))
            p, shrink = tl.exp(scores - new[:, None]), tl.exp(best - new)
            v = tl.load(v_ptr + row[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
            total = total * shrink + tl.sum(p, 1)
            best = new
    tl.store(o_ptr + (t * G + g[:, None]) * D + d[None, :], acc / total[:, None])


def test_blocks_chosen_by_data_inside_a_loop(run, check):
    T, S, BLOCK, G, D = 32, 3, 8, 4, 16
    q, k, v = torch.randn(T, G, D), torch.randn(T, D), torch.randn(T, D)
    index, right = torch.full((T, S), -1).int(), torch.empty(T, G, D).double()
    for t in range(T):
        own = t // BLOCK
        blocks = [own, *torch.randperm(own)[: S - 1].tolist()]
        index[t, torch.randperm(S)[: len(blocks)]] = torch.tensor(blocks).int()
        rows = [r for b in blocks for r in range(b * BLOCK, (b + 1) * BLOCK) if r <= t]
        scores = q[t].double() @ k[rows].double().T * D**-0.5
        right[t] = scores.softmax(-1) @ v[rows].double()
    o = torch.empty(T, G, D)
    run(chosen_blocks_kernel, (T,))(q, k, v, index, o, D**-0.5, S, T, BLOCK=BLOCK, G=G, D=D)
    check(o, right, atol=5e-6)


@triton.jit
def stores_in_branches_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    for k in range(n):
        y = tl.load(y_ptr + i)
        if tl.sum(y) % 2 == 0:
            tl.store(y_ptr + i, y + x)
            x = x + k
        else:
            tl.store(y_ptr + (BLOCK - 1 - i), y)
            if k > 2:
                x = tl.load(y_ptr + i) - x
    tl.store(x_ptr + i, x)


@pytest.mark.parametrize("n", [1, 8])
def test_branches_of_a_loop_store_and_load(run, check, n):
    x, y = torch.randint(-9, 9, (32,)).int(), torch.randint(-9, 9, (32,)).int()
    a, b = x.clone(), y.clone()
    for k in range(n):
        if b.sum() % 2 == 0:
            a, b = a + k, b + a
        else:
            b = b.flip(0)
            a = b - a if k > 2 else a
    run(stores_in_branches_kernel, (1,))(x, y, n, BLOCK=32)
    check(x, a)
    check(y, b)


@triton.jit
def hashed_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    h = (x * 1103515245 + 12345) * 40503
    tl.store(y_ptr + i, h > 0)
    tl.store(y_ptr + BLOCK + i, tl.where(h < x, h, x))
    tl.store(y_ptr + 2 * BLOCK + i, (x * 65537 > x * 65536).to(tl.int32))
    tl.store(y_ptr + 3 * BLOCK + i, (x + n > x).to(tl.int32))  # false where the sum wraps
    tl.store(y_ptr + 4 * BLOCK + i, (h ^ (h >> 15)) % 97)
    best = tl.max(h)
    if best * 3 < best:
        tl.store(y_ptr + 5 * BLOCK + i, best)
    else:
        tl.store(y_ptr + 5 * BLOCK + i, -best)
    u = x.to(tl.uint32) * 2654435761
    tl.store(y_ptr + 6 * BLOCK + i, (u >> 25).to(tl.int32))
    tl.store(y_ptr + 7 * BLOCK + i, (i * 600000000 < 0).to(tl.int32))


def wrap(x):
    return (x + 2**31) % 2**32 - 2**31


def test_hashes_wrap_in_comparisons_too(run, check):
    x, y = torch.randint(-(2**31), 2**31 - 1, (64,)).int(), torch.empty(8, 64).int()
    x[:3] = torch.tensor([2**31 - 1, -(2**31), 2**31 - 5])
    run(hashed_kernel, (1,))(x, y, 7, BLOCK=64)
    x, i = x.long(), torch.arange(64)
    h = wrap(wrap(x * 1103515245 + 12345) * 40503)
    mixed = torch.fmod(h ^ (h >> 15), 97)
    best = h.max()
    branch = best if wrap(best * 3) < best else -best
    u = x % 2**32 * 2654435761 % 2**32
    rows = [h > 0, torch.minimum(h, x), wrap(x * 65537) > wrap(x * 65536), wrap(x + 7) > x, mixed]
    rows += [branch.expand(64), u >> 25, wrap(i * 600000000) < 0]
    check(y, torch.stack([r.long() for r in rows]))


@triton.jit
def wrapped_address_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    hashed = ((i.to(tl.int64) * 2654435769) >> 3) % n
    tl.store(y_ptr + i, tl.load(x_ptr + hashed))
    narrow = (i * 1640531527) & 63  # int32: wraps
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + narrow))
    around = (i + 40) % BLOCK
    tl.store(y_ptr + 2 * BLOCK + i, tl.load(x_ptr + around))
    byte = (i * 9).to(tl.int8)
    tl.store(y_ptr + 3 * BLOCK + i, tl.load(x_ptr + 128 + byte))


def test_addresses_wrap_where_their_integers_wrap(run, check):
    x, y = torch.randn(256), torch.empty(4, 64)
    run(wrapped_address_kernel, (1,))(x, y, 61, BLOCK=64)
    i = torch.arange(64)
    places = [((i * 2654435769) >> 3) % 61, wrap(i * 1640531527) & 63, (i + 40) % 64]
    check(y, torch.stack([x[p] for p in [*places, 128 + (i * 9).to(torch.int8).long()]]))
