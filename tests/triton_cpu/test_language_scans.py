"""Scans, sorting and what else reorders elements by their value."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def place(M: tl.constexpr, N: tl.constexpr):
    return tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def sums_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = place(M, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.cumsum(x, 0))
    tl.store(y_ptr + M * N + i, tl.cumsum(x, axis=1))
    tl.store(y_ptr + 2 * M * N + i, tl.cumsum(x, 0, reverse=True))
    tl.store(y_ptr + 3 * M * N + i, tl.cumsum(x, -1, reverse=True))
    tl.store(y_ptr + 4 * M * N + i, tl.cumsum(tl.cumsum(x + 1, 0), 1) - x)


def reverse_cumsum(x, axis):
    return x.flip(axis).cumsum(axis).flip(axis)


@pytest.mark.ops("cumsum")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (1, 64), (64, 1)], ids=str)
def test_running_sums_both_ways_along_each_axis(run, check, shape, dtype):
    x, y = torch.randint(-9, 9, shape).to(dtype), torch.empty(5, *shape, dtype=dtype)
    run(sums_kernel, (1,))(x, y, M=shape[0], N=shape[1])
    right = [x.cumsum(0), x.cumsum(1), reverse_cumsum(x, 0), reverse_cumsum(x, 1)]
    check(y, torch.stack([*right, (x + 1).cumsum(0).cumsum(1) - x]))


@triton.jit
def narrow_kernel(x_ptr, h_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.cumsum(x))  # int8 in int32
    tl.store(y_ptr + BLOCK + i, tl.cumsum((x > 0).to(tl.int32)))
    tl.store(z_ptr + i, tl.cumsum(tl.load(h_ptr + i)))


@pytest.mark.ops("cumsum")
def test_running_sums_of_narrow_dtypes(run, check):
    x, h = torch.randint(-128, 127, (128,), dtype=torch.int8), torch.randint(-3, 3, (128,)).half()
    y, z = torch.empty(2, 128, dtype=torch.int64), torch.empty(128)
    run(narrow_kernel, (1,))(x, h, y, z, BLOCK=128)
    check(y, torch.stack([x.long().cumsum(0), (x > 0).long().cumsum(0)]))
    check(z, h.float().cumsum(0))


@triton.jit
def bfloat16_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.cumsum(tl.load(x_ptr + i)))


@pytest.mark.ops("cumsum")
@pytest.mark.no_interpreter("it reads bfloat16 wrong")
def test_running_sums_of_bfloat16(run, check):
    x, y = torch.randint(-1, 2, (128,)).bfloat16(), torch.empty(128)  # sums below 256: exact
    run(bfloat16_kernel, (1,))(x, y, BLOCK=128)
    check(y, x.double().cumsum(0))


@triton.jit
def products_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = place(M, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.cumprod(x, 0))
    tl.store(y_ptr + M * N + i, tl.cumprod(x, 1, reverse=True))


@pytest.mark.ops("cumprod")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_running_products(run, check, dtype):
    x = torch.tensor([-1, 1, 2, 1]).to(dtype)[torch.randint(0, 4, (8, 16))]
    y = torch.empty(2, 8, 16, dtype=dtype)
    run(products_kernel, (1,))(x, y, M=8, N=16)
    check(y, torch.stack([x.cumprod(0), x.flip(1).cumprod(1).flip(1)]))


@triton.jit
def linear_combine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def largest_combine(a, b):
    return tl.maximum(a, b)


@triton.jit
def segment_combine(sum_a, flag_a, sum_b, flag_b):
    return tl.where(flag_b != 0, sum_b, sum_a + sum_b), flag_a | flag_b


@triton.jit
def scans_kernel(a_ptr, x_ptr, f_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = place(M, N)
    a, x, f = tl.load(a_ptr + i), tl.load(x_ptr + i), tl.load(f_ptr + i)
    decay, state = tl.associative_scan((a, x), 0, linear_combine)
    tl.store(y_ptr + i, state)
    tl.store(y_ptr + M * N + i, decay)
    _, state = tl.associative_scan((a, x), axis=1, combine_fn=linear_combine, reverse=True)
    tl.store(y_ptr + 2 * M * N + i, state)
    tl.store(y_ptr + 3 * M * N + i, tl.associative_scan(x, 1, largest_combine))
    sums, _ = tl.associative_scan((x, f), 1, segment_combine)
    tl.store(y_ptr + 4 * M * N + i, sums)


def recurrence(a, x):
    """Return h with h[t] = a[t] h[t - 1] + x[t] along the first axis."""
    states, h = [], torch.zeros_like(x[0])
    for a_t, x_t in zip(a, x):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states)


@pytest.mark.ops("associative_scan")
def test_any_associative_function_is_scanned(run, check):
    M, N = 16, 32
    a, x = torch.rand(M, N), torch.randn(M, N)
    f, y = (torch.rand(M, N) < 0.2).int(), torch.empty(5, M, N)
    run(scans_kernel, (1,))(a, x, f, y, M=M, N=N)
    a, x = a.double(), x.double()
    check(y[0], recurrence(a, x), atol=1e-5)
    check(y[1], a.cumprod(0), ulp=20)
    check(y[2], recurrence(a.T.flip(0), x.T.flip(0)).flip(0).T, atol=1e-5)
    check(y[3], x.cummax(1)[0])
    keep = 1.0 - f.double()
    check(y[4], recurrence(keep.T, x.T).T, atol=1e-5)


@triton.jit
def sorted_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = place(M, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.sort(x))
    tl.store(y_ptr + M * N + i, tl.sort(x, dim=1, descending=True))


@pytest.mark.ops("sort")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (4, 16), (8, 2), (2, 1)], ids=str)
def test_rows_are_sorted_either_way(run, check, shape, dtype):
    x = torch.randint(-50, 50, shape).to(dtype)
    y = torch.empty(2, *shape, dtype=dtype)
    run(sorted_kernel, (1,))(x, y, M=shape[0], N=shape[1])
    up = x.sort(1)[0]
    check(y, torch.stack([up, up.flip(1)]))


@triton.jit
def sorted_bits_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.sort(tl.load(x_ptr + i)))


@pytest.mark.ops("sort")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint32], ids=str)
def test_sorting_minds_the_sign(run, check, dtype):
    x = torch.randint(0, 2**32, (128,)).to(dtype)
    y = torch.empty_like(x)
    run(sorted_bits_kernel, (1,))(x, y, BLOCK=128)
    wide, got = x.view(torch.int32 if dtype == torch.uint32 else dtype).long(), y
    if dtype == torch.uint32:
        wide, got = wide % 2**32, y.view(torch.int32)
    check(got, wide.sort()[0].to(got.dtype))


@pytest.mark.ops("sort")
def test_infinities_are_sorted_to_the_ends(run, check):
    x, y = torch.randn(128), torch.empty(128)
    x[3], x[99], x[5], x[7] = float("inf"), float("-inf"), 0.0, -0.0
    run(sorted_bits_kernel, (1,))(x, y, BLOCK=128)
    check(y, x.sort()[0])


@triton.jit
def largest_kernel(x_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + place(M, N))
    tl.store(y_ptr + place(M, K), tl.topk(x, K))
    row = tl.load(x_ptr + tl.arange(0, N))
    tl.store(z_ptr + tl.arange(0, K), tl.topk(row, K, dim=0))


@pytest.mark.ops("topk")
@pytest.mark.parametrize("k", [2, 4, 32])
def test_the_largest_come_in_order(run, check, k):
    x, y, z = torch.randn(4, 32), torch.empty(4, k), torch.empty(k)
    run(largest_kernel, (1,))(x, y, z, M=4, N=32, K=k)
    check(y, x.topk(k)[0])
    check(z, x[0].topk(k)[0])


@triton.jit
def packed_topk_kernel(x_ptr, v_ptr, i_ptr, n, BLOCK: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    key = (x.to(tl.int64) << 32) | (BLOCK - i)
    best = tl.topk(key, K)
    tl.store(v_ptr + tl.arange(0, K), (best >> 32).to(tl.int32))
    tl.store(i_ptr + tl.arange(0, K), BLOCK - (best & 0xFFFFFFFF).to(tl.int32))


@pytest.mark.ops("topk")
def test_keys_of_64_bits_carry_their_places(run, check):
    x = torch.randint(0, 20, (50,), dtype=torch.int32)
    v, i = torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    run(packed_topk_kernel, (1,))(x, v, i, 50, BLOCK=64, K=8)
    order = x.sort(descending=True, stable=True)
    check(v, order[0][:8])
    check(i, order[1][:8].int())


@triton.jit
def merged_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)  # rises, then falls
    tl.store(y_ptr + i, tl.bitonic_merge(x))
    tl.store(y_ptr + N + i, tl.bitonic_merge(x, descending=True))


@pytest.mark.ops("bitonic_merge")
@pytest.mark.skipif(not hasattr(tl, "bitonic_merge"), reason="not in this Triton")
def test_a_bitonic_row_is_merged(run, check):
    x, y = torch.randn(64), torch.empty(2, 64)
    x = torch.cat([x[:32].sort()[0], x[32:].sort(descending=True)[0]])
    run(merged_kernel, (1,))(x, y, N=64)
    up = x.sort()[0]
    check(y, torch.stack([up, up.flip(0)]))


@triton.jit
def gathered_kernel(x_ptr, i_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + place(M, N))
    tl.store(y_ptr + place(M, K), tl.gather(x, tl.load(i_ptr + place(M, K)) % N, 1))
    tl.store(z_ptr + place(K, N), tl.gather(x * 2, tl.load(i_ptr + place(K, N)) % M, axis=0))


@pytest.mark.ops("gather")
def test_elements_are_gathered_along_each_axis(run, check):
    M, N, K = 8, 16, 32
    x, i = torch.randn(M, N), torch.randint(0, 1000, (K * N,), dtype=torch.int32)
    y, z = torch.empty(M, K), torch.empty(K, N)
    run(gathered_kernel, (1,))(x, i, y, z, M=M, N=N, K=K)
    check(y, x.gather(1, i[: M * K].view(M, K).long() % N))
    check(z, 2 * x.gather(0, i.view(K, N).long() % M))


@triton.jit
def histogram_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i, b = tl.arange(0, BLOCK), tl.arange(0, BINS)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + b, tl.histogram(x, BINS))
    tl.store(y_ptr + BINS + b, tl.histogram(x, BINS, mask=i < n))


@pytest.mark.ops("histogram")
@pytest.mark.parametrize("bins", [2, 64, 256])
def test_values_are_counted(run, check, bins):
    x, y = torch.randint(0, bins, (512,), dtype=torch.int32), torch.empty(2, bins).int()
    run(histogram_kernel, (1,))(x, y, 300, BLOCK=512, BINS=bins)
    check(y, torch.stack([torch.bincount(part, minlength=bins) for part in (x, x[:300])]))


@triton.jit
def doubled_or_cubed(x):
    if x > 0:
        y = x * 2
    else:
        y = x * x * x
    return y


@triton.jit
def quotient(x, y):
    return x // y, x % y


@triton.jit
def mapped_kernel(x_ptr, i_ptr, y_ptr, j_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.map_elementwise(doubled_or_cubed, tl.load(x_ptr + i)))
    a, b = tl.map_elementwise(quotient, tl.load(i_ptr + i), i + 1)
    tl.store(j_ptr + i, a)
    tl.store(j_ptr + BLOCK + i, b)


@pytest.mark.ops("map_elementwise")
@pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="not in this Triton")
@pytest.mark.no_interpreter("it has no map_elementwise")
def test_a_scalar_function_is_mapped(run, check):
    x, i = torch.randn(64), torch.randint(0, 999, (64,), dtype=torch.int32)
    y, j = torch.empty(64), torch.empty(2, 64, dtype=torch.int32)
    run(mapped_kernel, (1,))(x, i, y, j, BLOCK=64)
    check(y, torch.where(x > 0, x * 2, x.double() ** 3), ulp=2)
    n = torch.arange(1, 65)
    check(j, torch.stack([i // n, i % n]))


@triton.jit
def swapped(a, b):
    return b, a


@triton.jit
def packed_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.map_elementwise(swapped, tl.load(x_ptr + i), pack=2)[0])


@pytest.mark.ops("map_elementwise")
@pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="not in this Triton")
@pytest.mark.no_interpreter("it has no map_elementwise")
def test_a_scalar_function_may_take_two_elements_at_once(run, check):
    # which elements share a call is the compiler's business: the pairs only have to be disjoint
    x, y = torch.randperm(64).float(), torch.empty(64)
    run(packed_kernel, (1,))(x, y, BLOCK=64)
    check(y.sort()[0], x.sort()[0])
