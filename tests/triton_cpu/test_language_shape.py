"""Shapes: every operation that moves elements without changing them."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def broadcast_kernel(x_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x, y = tl.load(x_ptr + m), tl.load(y_ptr + n)
    place = m[:, None] * N + n[None, :]
    a, b = tl.broadcast(x[:, None], y[None, :])
    tl.store(z_ptr + place, a + b)
    tl.store(z_ptr + M * N + place, tl.broadcast_to(tl.expand_dims(x, 1), (M, N)))
    tl.store(z_ptr + 2 * M * N + place, tl.broadcast_to(y[None, :], M, N))
    tl.store(z_ptr + 3 * M * N + place, tl.broadcast_to(tl.load(x_ptr), (M, N)))
    tl.store(z_ptr + 4 * M * N + place, y.expand_dims(0).broadcast_to(M, N) * 2)
    cube = tl.expand_dims(x, (0, 2)) - y[None, None, :]  # [1, M, N]
    tl.store(z_ptr + 5 * M * N + place[None, :, :], cube)


@pytest.mark.ops("broadcast", "broadcast_to", "expand_dims")
def test_tensors_are_broadcast(run, check):
    x, y, z = torch.randn(4), torch.randn(8), torch.empty(6, 4, 8)
    run(broadcast_kernel, (1,))(x, y, z, M=4, N=8)
    rows = [x[:, None] + y, x[:, None].expand(4, 8), y.expand(4, 8), x[0].expand(4, 8)]
    check(z, torch.stack([*rows, 2 * y.expand(4, 8), x[:, None] - y]))


@triton.jit
def joined_kernel(x_ptr, y_ptr, z_ptr, u_ptr, v_ptr, s_ptr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    both = tl.join(x, y)  # [M, N, 2]
    tl.store(z_ptr + place[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], both)
    u, v = tl.split(both * 2)
    tl.store(u_ptr + place, u)
    tl.store(v_ptr + place, v)
    wide = tl.arange(0, M)[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :]
    tl.store(z_ptr + 2 * M * N + wide, tl.interleave(x, y))
    pair = tl.join(tl.load(x_ptr), tl.load(y_ptr))  # [2], of two scalars
    tl.store(s_ptr + tl.arange(0, 2), pair)
    first, second = tl.split(pair)
    tl.store(s_ptr + 2, second)
    tl.store(s_ptr + 3, first)


@pytest.mark.ops("join", "split", "interleave")
def test_tensors_are_joined_and_split(run, check):
    x, y, z = torch.randn(4, 8), torch.randn(4, 8), torch.empty(2, 4, 8, 2)
    u, v, s = torch.empty(4, 8), torch.empty(4, 8), torch.empty(4)
    run(joined_kernel, (1,))(x, y, z, u, v, s, M=4, N=8)
    both = torch.stack([x, y], -1)
    check(z, torch.stack([both, both]))
    check(u, 2 * x)
    check(v, 2 * y)
    a, b = x[0, 0], y[0, 0]
    check(s, torch.stack([a, b, b, a]))


@triton.jit
def reshaped_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M * N)
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    place = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(y_ptr + place, tl.reshape(x, (N, M)))
    tl.store(y_ptr + M * N + i, tl.ravel(x))
    tl.store(y_ptr + 2 * M * N + place, x.reshape(2, M * N // 2).reshape(N, M) + 1)
    cube = tl.reshape(x, 2, M // 2, N)
    tl.store(y_ptr + 3 * M * N + tl.reshape(i, (2, M // 2, N)), cube)
    tl.store(y_ptr + 4 * M * N + i, tl.reshape(x + tl.reshape(i, M, N), [M * N]))


@pytest.mark.ops("reshape", "ravel")
def test_reshaping_keeps_the_order(run, check):
    x, y = torch.randn(4, 8), torch.empty(5, 32)
    run(reshaped_kernel, (1,))(x, y, M=4, N=8)
    flat = x.flatten()
    check(y, torch.stack([flat, flat, flat + 1, flat, flat + torch.arange(32)]))


@triton.jit
def viewed_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M * N), tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(y_ptr + j, tl.view(tl.load(x_ptr + i), (N, M)))
    tl.store(y_ptr + M * N + i, tl.reshape(tl.load(x_ptr + j), [M * N], can_reorder=True))


@pytest.mark.ops("view", "reshape")
@pytest.mark.filterwarnings("ignore:view is deprecated")
def test_a_view_has_the_same_elements_in_any_order(run, check):
    x, y = torch.randn(32), torch.empty(2, 32)
    run(viewed_kernel, (1,))(x, y, M=4, N=8)
    check(y.sort(1)[0], x.sort()[0].expand(2, 32))


@triton.jit
def transposed_kernel(x_ptr, y_ptr, L: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    l, m, n = tl.arange(0, L), tl.arange(0, M), tl.arange(0, N)
    square = tl.load(x_ptr + m[:, None] * N + n[None, :])
    turned = n[:, None] * M + m[None, :]
    tl.store(y_ptr + turned, tl.trans(square))
    tl.store(y_ptr + M * N + turned, square.T + 1)
    tl.store(y_ptr + 2 * M * N + turned, tl.permute(square, (1, 0)))
    y_ptr += 3 * M * N
    cube = tl.load(x_ptr + l[:, None, None] * M * N + m[None, :, None] * N + n[None, None, :])
    size = L * M * N
    j = tl.arange(0, L * M * N)
    tl.store(y_ptr + j, tl.ravel(tl.permute(cube, (2, 0, 1))))
    tl.store(y_ptr + size + j, tl.ravel(tl.trans(cube, 1, 0, 2)))
    tl.store(y_ptr + 2 * size + j, tl.ravel(cube.permute(0, 2, 1)))
    tl.store(y_ptr + 3 * size + j, tl.ravel(tl.trans(tl.trans(cube, 1, 2, 0), (2, 1, 0))))
    flat = l[:, None, None] + n[None, :, None] * L + m[None, None, :] * L * N
    tl.store(y_ptr + 4 * size + flat, tl.permute(cube, 0, 2, 1))


@pytest.mark.ops("trans", "permute")
def test_axes_are_permuted(run, check):
    x, y = torch.randn(2, 4, 8), torch.empty(3 * 32 + 5 * 64)
    run(transposed_kernel, (1,))(x, y, L=2, M=4, N=8)
    square = x[0].T.flatten()
    cubes = [x.permute(2, 0, 1), x.transpose(0, 1), x.mT, x.permute(0, 2, 1).transpose(0, 1)]
    cubes += [x.permute(1, 2, 0)]
    cubes[3] = x.permute(1, 2, 0).permute(2, 1, 0)
    check(y, torch.cat([square, square + 1, square, *(c.flatten() for c in cubes)]))


@triton.jit
def four_axes_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 64)
    x = tl.reshape(tl.load(x_ptr + i), (2, 4, 2, 4))
    y = tl.permute(x, (3, 1, 0, 2)) * 2
    y = tl.sum(tl.reshape(y, (4, 4, 2, 2, 1)), axis=2)  # [4, 4, 2, 1]
    tl.store(y_ptr + tl.arange(0, 32), tl.ravel(y))


@pytest.mark.ops("permute", "reshape", "sum")
def test_four_axes_are_permuted_and_reduced(run, check):
    x, y = torch.randint(-9, 9, (64,)).float(), torch.empty(32)
    run(four_axes_kernel, (1,))(x, y)
    check(y, (x.view(2, 4, 2, 4).permute(3, 1, 0, 2) * 2).sum(2).flatten())


@triton.jit
def flipped_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, tl.flip(x, 1))
    tl.store(y_ptr + M * N + place, tl.flip(x, 0))
    tl.store(y_ptr + 2 * M * N + place, tl.flip(x, -1) + tl.flip(x.flip(0), dim=1))


@pytest.mark.ops("flip")
def test_axes_are_flipped(run, check):
    x, y = torch.randn(4, 16), torch.empty(3, 4, 16)
    run(flipped_kernel, (1,))(x, y, M=4, N=16)
    check(y, torch.stack([x.flip(1), x.flip(0), x.flip(1) + x.flip(0, 1)]))


@triton.jit
def squeezed_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tall = tl.unsqueeze(x, 0) + tl.unsqueeze(m, 1).to(tl.float32)  # [M, N]
    tl.store(y_ptr + m[:, None] * N + n[None, :], tall)
    tl.store(y_ptr + M * N + n, tl.squeeze(tl.unsqueeze(x, 1), 1))


@pytest.mark.ops("squeeze", "unsqueeze")
@pytest.mark.skipif(not hasattr(tl, "squeeze"), reason="not in this Triton")
def test_axes_of_length_one_come_and_go(run, check):
    x, y = torch.randn(8), torch.empty(5, 8)
    run(squeezed_kernel, (1,))(x, y, M=4, N=8)
    check(y, torch.cat([x + torch.arange(4)[:, None], x[None]]))


@triton.jit
def one_element_kernel(x_ptr, y_ptr):
    one = tl.load(x_ptr + tl.arange(0, 1))  # [1]
    tl.store(y_ptr, tl.sum(one))
    tl.store(y_ptr + 1 + tl.arange(0, 1), one * 2)
    tl.store(y_ptr + 2, tl.reshape(one, ()) + 1)
    square = tl.broadcast_to(one[:, None], (1, 1))
    tl.store(y_ptr + 3 + tl.arange(0, 4), tl.broadcast_to(tl.reshape(square, (1,)), (4,)))


@pytest.mark.ops("reshape", "broadcast_to")
def test_tensors_of_one_element_are_tensors(run, check):
    x, y = torch.tensor([3.0]), torch.empty(7)
    run(one_element_kernel, (1,))(x, y)
    check(y, torch.tensor([3.0, 6, 4, 3, 3, 3, 3]))


@triton.jit
def item_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.arange(0, 1)).item() * 2)


@pytest.mark.ops("item")
@pytest.mark.skipif(not hasattr(tl.core, "item"), reason="not in this Triton")
def test_one_element_becomes_a_scalar(run, check):
    x, y = torch.tensor([3.0]), torch.empty(1)
    run(item_kernel, (1,))(x, y)
    check(y, 2 * x)
