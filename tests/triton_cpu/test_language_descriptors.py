"""Tensor descriptors: made on the device and on the host, with blocks beyond every edge."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

NAN = float("nan")


@triton.jit
def device_kernel(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y_desc = tl.make_tensor_descriptor(
        y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_M, BLOCK_N]
    )
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    x = x_desc.load([m, n])
    inside = tl.sum(x, 1)[:, None]  # what is outside counts as 0
    tl.store_tensor_descriptor(y_desc, [m, n], x + inside)
    y_desc.store([m, n], tl.load_tensor_descriptor(y_desc, [m, n]) * 2)


@pytest.mark.ops(
    *("make_tensor_descriptor", "load_tensor_descriptor", "store_tensor_descriptor"),
    *("tensor_descriptor.load", "tensor_descriptor.store"),
)
@pytest.mark.parametrize("shape", [(16, 32), (10, 20), (33, 4)], ids=str)
def test_blocks_beyond_the_edges_are_cut(run, check, fenced, shape):
    M, N = shape
    data = torch.randint(-9, 9, shape).float()
    # a copy with a fence behind it is aligned to 16 bytes only where the size is
    x, y = fenced(data), fenced(torch.zeros(shape))
    grid = (triton.cdiv(M, 8), triton.cdiv(N, 16))
    run(device_kernel, grid)(x, y, M, N, BLOCK_M=8, BLOCK_N=16)
    sums = torch.cat([part.sum(1, True).expand_as(part) for part in data.split(16, 1)], 1)
    check(y, 2 * (data + sums))


@triton.jit
def padded_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK], padding_option="nan")
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + i, desc.load([0, 4]))
    zero = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    tl.store(y_ptr + BLOCK * BLOCK + i, zero.load([-8, -4]))


@pytest.mark.ops("make_tensor_descriptor", "tensor_descriptor.load")
def test_what_is_outside_is_padded(run, check):
    x, y = torch.randn(6, 12), torch.empty(2, 16, 16)
    run(padded_kernel, (1,))(x, y, 6, 12, BLOCK=16)
    right = torch.full((2, 16, 16), NAN)
    right[0, :6, :8] = x[:, 4:]
    right[1] = 0
    right[1, 8:14, 4:16] = x
    check(y, right)


@triton.jit
def ranks_kernel(x_ptr, v_ptr, y_ptr, w_ptr, A, B, C, BLOCK: tl.constexpr):
    cube = tl.make_tensor_descriptor(x_ptr, [A, B, C], [B * C, C, 1], [1, BLOCK, BLOCK])
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for a in range(A):
        block = cube.load([a, 1, 4]).reshape(BLOCK, BLOCK)
        tl.store(y_ptr + a * BLOCK * BLOCK + i, block)
    line = tl.make_tensor_descriptor(v_ptr, [C], [1], [BLOCK])
    tl.store(w_ptr + tl.arange(0, BLOCK), line.load([8]))


@pytest.mark.ops("make_tensor_descriptor", "tensor_descriptor.load")
def test_descriptors_of_one_and_three_axes(run, check):
    x, v = torch.randn(3, 6, 12), torch.randn(12)
    y, w = torch.empty(3, 8, 8), torch.empty(8)
    run(ranks_kernel, (1,))(x, v, y, w, 3, 6, 12, BLOCK=8)
    right = torch.zeros(3, 8, 8)
    right[:, :5, :] = x[:, 1:, 4:]
    check(y, right)
    check(w, torch.cat([v[8:], torch.zeros(4)]))


@triton.jit
def host_kernel(x_desc, y_desc, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for n in range(0, x_desc.shape[1].to(tl.int32), BLOCK):
        total += x_desc.load([m, n]).to(tl.float32)
    y_desc.store([m, 0], total.to(y_desc.dtype))


@pytest.mark.ops("descriptors from the host", "tensor_descriptor.load", "tensor_descriptor.store")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_descriptors_come_from_the_host(run, check, dtype):
    x, y = torch.randint(-9, 9, (20, 40)).to(dtype), torch.zeros(20, 16)
    x_desc = TensorDescriptor.from_tensor(x, [16, 16])
    y_desc = TensorDescriptor(y, [20, 16], [16, 1], [16, 16])
    run(host_kernel, (2,))(x_desc, y_desc, BLOCK=16)
    padded = torch.nn.functional.pad(x.float(), (0, 8))
    check(y, padded.view(20, 3, 16).sum(1))


@triton.jit
def product_kernel(a_desc, b_desc, c_desc, K, BLOCK: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, BLOCK):
        a, b = a_desc.load([m, k]), b_desc.load([n, k])
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    c_desc.store([m, n], acc)


@pytest.mark.ops("descriptors from the host", "tensor_descriptor.load", "dot")
def test_a_product_of_descriptors(run, check):
    a, b, c = torch.randn(40, 52), torch.randn(24, 52), torch.zeros(40, 24)
    descriptors = [TensorDescriptor.from_tensor(t, [16, 16]) for t in (a, b, c)]
    run(product_kernel, (3, 2))(*descriptors, 52, BLOCK=16)
    check(c, a.double() @ b.double().T, atol=1e-4)


@triton.jit
def rows_kernel(x_ptr, rows_ptr, y_ptr, z_ptr, M, N, R: tl.constexpr, BLOCK: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [1, BLOCK])
    z_desc = tl.make_tensor_descriptor(z_ptr, [M, N], [N, 1], [1, BLOCK])
    rows = tl.load(rows_ptr + tl.arange(0, R))
    x = x_desc.gather(rows, 8)
    tl.store(y_ptr + tl.arange(0, R)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], x)
    z_desc.scatter(x * 2, rows, 8)


@pytest.mark.ops("tensor_descriptor.gather", "tensor_descriptor.scatter")
@pytest.mark.no_interpreter("it gathers with a block of the wrong shape")
def test_rows_are_gathered_and_scattered(run, check):
    x, rows = torch.randn(20, 24), torch.randperm(20)[:8].int()
    y, z = torch.empty(8, 16), torch.zeros(20, 24)
    run(rows_kernel, (1,))(x, rows, y, z, 20, 24, R=8, BLOCK=16)
    picked = x[rows.long(), 8:]
    check(y, picked)
    right = torch.zeros(20, 24)
    right[rows.long(), 8:] = 2 * picked
    check(z, right)


@triton.jit
def atomics_kernel(x_ptr, v_ptr, M, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = tl.load(v_ptr + i)
    size = M * N
    desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.atomic_add([0, 4], v)
    tl.make_tensor_descriptor(x_ptr + size, [M, N], [N, 1], [BLOCK, BLOCK]).atomic_max([0, 4], v)
    desc = tl.make_tensor_descriptor(x_ptr + 2 * size, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.atomic_min([0, 4], v)
    desc = tl.make_tensor_descriptor(x_ptr + 3 * size, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.atomic_and([0, 4], v)
    desc = tl.make_tensor_descriptor(x_ptr + 4 * size, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.atomic_or([0, 4], v)
    desc = tl.make_tensor_descriptor(x_ptr + 5 * size, [M, N], [N, 1], [BLOCK, BLOCK])
    desc.atomic_xor([0, 4], v)


@pytest.mark.ops(
    *("tensor_descriptor.atomic_add", "tensor_descriptor.atomic_max"),
    *("tensor_descriptor.atomic_min", "tensor_descriptor.atomic_and"),
    *("tensor_descriptor.atomic_or", "tensor_descriptor.atomic_xor"),
)
@pytest.mark.no_interpreter("it has no atomic operations of descriptors")
def test_atomic_operations_of_descriptors(run, check):
    M, N, n = 6, 12, 3
    x, v = torch.randint(0, 99, (6, M, N)).int(), torch.randint(0, 99, (8, 8)).int()
    right, inside = x.clone(), v[:M]
    run(atomics_kernel, (n,))(x, v, M, N, BLOCK=8)
    right[0, :, 4:] += n * inside
    right[1, :, 4:] = torch.maximum(right[1, :, 4:], inside)
    right[2, :, 4:] = torch.minimum(right[2, :, 4:], inside)
    right[3, :, 4:] &= inside
    right[4, :, 4:] |= inside
    right[5, :, 4:] ^= inside  # three times is once
    check(x, right)
