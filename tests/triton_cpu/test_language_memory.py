"""Loads and stores: masks, dtypes, scalars, pointers as values, memory that must not be touched."""

import pytest
import torch
import triton
import triton.language as tl

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
INTEGERS += [torch.int64, torch.uint64]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


def random_bits(n, dtype):
    """Return n elements of any bit pattern but NaN."""
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,)).bool()
    x = torch.randint(-(2**63), 2**63 - 1, (n,)).view(dtype)[:n].clone()
    if dtype.is_floating_point:
        x.view(torch.int8).view(n, -1)[x.float().isnan()] = 0
    return x


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x, mask=offsets < n)


@pytest.mark.ops("load", "store", "arange", "program_id")
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS, *EIGHT_BITS], ids=str)
def test_every_dtype_is_copied_bit_by_bit(run, check, dtype):
    x, y = random_bits(100, dtype), random_bits(128, dtype)
    expected = torch.cat([x, y[100:]])
    run(copy_kernel, (4,))(x, y, 100, BLOCK=32)
    check(y, expected)


@triton.jit
def masks_kernel(x_ptr, m_ptr, y_ptr, n, other, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=-1)
    tl.store(y_ptr + i, x)
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i, mask=i < n, other=i * 10))
    chosen = tl.load(m_ptr + i) != 0
    tl.store(y_ptr + 2 * BLOCK + i, tl.load(x_ptr + i, mask=chosen, other=other))
    tl.store(y_ptr + 3 * BLOCK + i, x, mask=chosen)
    tl.store(y_ptr + 4 * BLOCK + i, tl.load(x_ptr + i, mask=False, other=3))


@pytest.mark.ops("load", "store")
def test_a_mask_chooses_and_other_fills(run, check):
    x = torch.arange(32, dtype=torch.int32) * 3
    chosen = torch.randint(0, 2, (32,), dtype=torch.int8)
    y = torch.full((5, 32), -5, dtype=torch.int32)
    run(masks_kernel, (1,))(x, chosen, y, 20, 77, BLOCK=32)
    i, m = torch.arange(32, dtype=torch.int32), chosen.bool()
    head = torch.where(i < 20, x, -1)
    rows = [head, torch.where(i < 20, x, i * 10), torch.where(m, x, 77), torch.where(m, head, -5)]
    check(y, torch.stack([*rows, torch.full_like(x, 3)]))


@triton.jit
def scalar_masks_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 7, mask=n > 1000)
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr + i, mask=n > 0, other=0))
    tl.store(y_ptr + 2 * BLOCK + i, tl.load(x_ptr + i, mask=n > 1000, other=i))


@pytest.mark.ops("load", "store")
@pytest.mark.no_interpreter("that of Triton 3.9 takes no scalar for the mask of a block")
def test_a_scalar_masks_a_block(run, check):
    x, y = torch.arange(32, dtype=torch.int32) * 3, torch.full((3, 32), -5, dtype=torch.int32)
    run(scalar_masks_kernel, (1,))(x, y, 20, BLOCK=32)
    check(y, torch.stack([torch.full_like(x, -5), x, torch.arange(32, dtype=torch.int32)]))


@triton.jit
def scalars_kernel(x_ptr, y_ptr, go):
    x = tl.load(x_ptr)
    tl.store(y_ptr, x + 1)
    tl.store(y_ptr + 1, tl.load(x_ptr + 1, mask=go > 0, other=9.0))
    tl.store(y_ptr + 2, tl.load(x_ptr + 1, mask=go == 0, other=9.0))
    tl.store(y_ptr + 3, 5.0, mask=go == 0)
    tl.store(y_ptr + 4 + tl.arange(0, 4), x)  # one value to many places


@pytest.mark.ops("load", "store")
def test_scalars_are_loaded_and_stored(run, check):
    x, y = torch.tensor([2.0, 4.0]), torch.zeros(8)
    run(scalars_kernel, (1,))(x, y, 2)
    check(y, torch.tensor([3.0, 4.0, 9.0, 0.0, 2.0, 2.0, 2.0, 2.0]))


@triton.jit
def strides_kernel(
    x_ptr, y_ptr, x_stride_m, x_stride_n, y_stride_m, y_stride_n, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    x = tl.load(x_ptr + m[:, None] * x_stride_m + n[None, :] * x_stride_n, mask=inside, other=0.0)
    tl.store(y_ptr + m[:, None] * y_stride_m + n[None, :] * y_stride_n, x, mask=inside)


@pytest.mark.ops("load", "store", "program_id")
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps", "broadcast"])
def test_any_strides_are_followed(run, check, layout):
    x = torch.randn(13, 2, 37)
    x = {
        "rows": x[:, 0].contiguous(),
        "columns": x[:, 0].T.contiguous().T,
        "gaps": x[:, 1],
        "broadcast": x[0, 0].expand(13, 37),
    }[layout]
    y = torch.empty(37, 13).T
    run(strides_kernel, (4, 3))(x, y, *x.stride(), *y.stride(), 13, 37, BLOCK_M=4, BLOCK_N=16)
    check(y, x)


@triton.jit
def backwards_kernel(x_ptr, y_ptr, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * step))
    tl.store(y_ptr + BLOCK + i, tl.load(x_ptr - i.to(tl.int64)))


@pytest.mark.ops("load")
def test_pointers_may_walk_backwards(run, check):
    x, y = torch.randn(64), torch.empty(2, 16)
    run(backwards_kernel, (1,))(x[40:], y, -2, BLOCK=16)
    check(y, torch.stack([x.flip(0)[23:55:2], x.flip(0)[23:39]]))


@triton.jit
def gather_kernel(x_ptr, index_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i)
    tl.store(y_ptr + i, tl.load(x_ptr + index, mask=index >= 0, other=-1.0))
    tl.store(y_ptr + BLOCK + tl.load(index_ptr + BLOCK + i), i.to(tl.float32))


@pytest.mark.ops("load", "store")
def test_addresses_may_depend_on_data(run, check):
    x, y = torch.randn(50), torch.empty(2, 32)
    index = torch.stack([torch.randint(-5, 50, (32,)), torch.randperm(32)])
    run(gather_kernel, (1,))(x, index, y, BLOCK=32)
    picked = torch.where(index[0] >= 0, x[index[0].clamp_min(0)], -1.0)
    check(y, torch.stack([picked, index[1].argsort().float()]))


@triton.jit
def hints_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, cache_modifier=".ca")
    x += tl.load(x_ptr + i, cache_modifier=".cg", eviction_policy="evict_first")
    x += tl.load(x_ptr + i, volatile=True, eviction_policy="evict_last")
    tl.store(y_ptr + i, x, cache_modifier=".wb")
    tl.store(y_ptr + BLOCK + i, x + 1, cache_modifier=".cs", eviction_policy="evict_first")


@pytest.mark.ops("load", "store")
def test_cache_hints_change_nothing(run, check):
    x, y = torch.randn(32), torch.empty(2, 32)
    run(hints_kernel, (1,))(x, y, BLOCK=32)
    check(y, torch.stack([x + x + x, x + x + x + 1]), ulp=1)


@triton.jit
def pointer_table_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr + k).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + k * BLOCK + i, tl.load(x_ptr + i))
    tl.store(table_ptr + k, x_ptr.to(tl.int64) - tl.load(table_ptr + k))


@pytest.mark.ops("pointers from integers", "load", "cast")
def test_integers_from_memory_serve_as_pointers(run, check):
    xs = [torch.randn(16) for _ in range(3)]
    table, y = torch.tensor([x.data_ptr() for x in xs]), torch.empty(3, 16)
    run(pointer_table_kernel, (3,))(table, y, BLOCK=16)
    check(y, torch.stack(xs))
    check(table, torch.zeros(3, dtype=torch.int64))


@triton.jit
def far_kernel(x_ptr, y_ptr, far, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = far + i.to(tl.int64) * 0
    tl.store(y_ptr + i, tl.load(x_ptr + (row * 1024 + i)))


@pytest.mark.ops("offsets beyond 32 bits", "load")
def test_offsets_beyond_32_bits_are_followed(run, check):
    # the pages in between are never touched, so they cost nothing
    storage = torch.UntypedStorage(2**32 + 2**10)
    x = torch.empty(0, dtype=torch.int8).set_(storage)
    x[2**32 : 2**32 + 16] = torch.arange(16, dtype=torch.int8)
    y = torch.empty(16, dtype=torch.int8)
    run(far_kernel, (1,))(x, y, 2**22, BLOCK=16)
    check(y, torch.arange(16, dtype=torch.int8))


@triton.jit
def edge_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0) + 1, mask=i < n)


@triton.jit
def edge_before_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) - BLOCK // 2
    x = tl.load(x_ptr + i, mask=(i >= 0) & (i < n), other=0)
    tl.store(y_ptr + i, x + 1, mask=(i >= 0) & (i < n))


@pytest.mark.ops("masks at the end of memory", "load", "store")
@pytest.mark.parametrize("n", [1, 7, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.int64], ids=str)
def test_nothing_beyond_a_mask_is_touched(run, check, fenced, dtype, n):
    data = torch.randint(-9, 9, (n,)).to(dtype)
    x, y = fenced(data), fenced(torch.zeros_like(data))
    run(edge_kernel, (1,))(x, y, n, BLOCK=128)
    check(y, data + 1)
    y.zero_()
    run(edge_kernel, (8,))(x, y, n, BLOCK=16)
    check(y, data + 1)


@pytest.mark.ops("masks at the end of memory", "load", "store")
def test_nothing_before_a_mask_is_touched(run, check, fenced):
    data = torch.randn(20)
    x, y = fenced(data, front=True), fenced(torch.zeros(20), front=True)
    run(edge_before_kernel, (1,))(x, y, 20, BLOCK=64)
    check(y, data + 1)


@triton.jit
def fenced_rows_kernel(
    x_ptr, index_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], mask=inside, other=0.0)
    s = tl.sum(x * 2.0, axis=1)
    index = tl.load(index_ptr + m, mask=m < M, other=1 << 30)  # far out, and only where masked
    g = tl.load(x_ptr + index, mask=m < M, other=0.0)
    tl.store(y_ptr + m, s + g, mask=m < M)


@triton.jit
def fenced_product_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + i * K + k + j, mask=(i < M) & (k + j < K), other=0.0)
        b = tl.load(b_ptr + j * K + k + i, mask=(j < N) & (k + i < K), other=0.0)  # transposed
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + i * N + j, acc, mask=(i < M) & (j < N))


@pytest.mark.ops("load", "store")
def test_reductions_and_gathers_stay_inside(run, check, fenced):
    data, index = torch.randn(5, 19), torch.randint(0, 95, (5,), dtype=torch.int32)
    x, y = fenced(data), fenced(torch.zeros(5))
    run(fenced_rows_kernel, (1,))(x, fenced(index), y, 5, 19, BLOCK_M=8, BLOCK_N=32)
    check(y, data.double().sum(1) * 2 + data.flatten()[index.long()], ulp=0, atol=1e-5)


@pytest.mark.ops("masks at the end of memory", "load", "dot")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_of_a_product_stay_inside(run, check, fenced, dtype):
    a, b = torch.randn(5, 21).to(dtype), torch.randn(7, 21).to(dtype)
    c = fenced(torch.zeros(5, 7))
    run(fenced_product_kernel, (1,))(fenced(a), fenced(b), c, 5, 7, 21, BLOCK=16)
    check(c, a.double() @ b.double().T, atol=1e-5)


@triton.jit
def block_pointer_kernel(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x_block = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (0, 0), (BLOCK_M, BLOCK_N), (1, 0))
    y_block = tl.make_block_ptr(y_ptr, (M, N), (1, M), (0, 0), (BLOCK_M, BLOCK_N), (0, 1))
    for _ in range(0, N, BLOCK_N):
        x = tl.load(x_block, boundary_check=(0, 1), padding_option="zero")
        x += tl.sum(x, axis=1)[:, None]  # padding counts as 0
        tl.store(y_block, x, boundary_check=(0, 1))
        x_block = tl.advance(x_block, (0, BLOCK_N))
        y_block = tl.advance(y_block, (0, BLOCK_N))


@pytest.mark.ops("make_block_ptr", "advance", "load", "store")
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9), reason="removed in Triton 3.9"
)
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_advance_and_pad(run, check, fenced):
    data = torch.randn(6, 21)
    x, y = fenced(data), fenced(torch.zeros(21, 6))
    run(block_pointer_kernel, (1,))(x, y, 6, 21, BLOCK_M=8, BLOCK_N=16)
    sums = torch.cat([part.sum(1, True).expand_as(part) for part in data.split(16, 1)], 1)
    check(y, (data + sums).T, atol=1e-5)
