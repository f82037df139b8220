"""Random numbers: the very bits of Philox, and the distributions made from them."""

import pytest
import torch
import triton
import triton.language as tl

KEYS = {32: (0x9E3779B9, 0xBB67AE85), 64: (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)}
FACTORS = {32: (0xD2511F53, 0xCD9E8D57), 64: (0xD2E7470EE14C6C93, 0xCA5A826395121157)}


def philox(counter, key, rounds=10, bits=32):
    """Philox4x32 or 4x64 of Salmon et al. (2011), in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 2**bits - 1
    a, b = FACTORS[bits]
    for _ in range(rounds):
        high, low = b * c2 >> bits, b * c2 & mask
        high2, low2 = a * c0 >> bits, a * c0 & mask
        c0, c1, c2, c3 = high ^ c1 ^ k0, low, high2 ^ c3 ^ k1, low2
        k0, k1 = (k0 + KEYS[bits][0]) & mask, (k1 + KEYS[bits][1]) & mask
    return c0, c1, c2, c3


def signed(value, bits=32):
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def streams(seed, offsets, rounds=10):
    """Return four lists of 32-bit integers."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    counters = [(o & 0xFFFFFFFF, o >> 32 & 0xFFFFFFFF, 0, 0) for o in offsets]
    return list(zip(*(philox(c, key, rounds) for c in counters)))


@triton.jit
def integers_kernel(y_ptr, seed, start, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    offset = start + i
    a, b, c, d = tl.randint4x(seed, offset)
    tl.store(y_ptr + i, a.to(tl.int32, bitcast=True))
    tl.store(y_ptr + BLOCK + i, b.to(tl.int32, bitcast=True))
    tl.store(y_ptr + 2 * BLOCK + i, c.to(tl.int32, bitcast=True))
    tl.store(y_ptr + 3 * BLOCK + i, d.to(tl.int32, bitcast=True))
    tl.store(y_ptr + 4 * BLOCK + i, tl.randint(seed, offset, 6).to(tl.int32, bitcast=True))


@pytest.mark.ops("randint4x", "randint")
@pytest.mark.parametrize("seed", [0, 1234, 2**31 - 1, 0x123456789ABCDEF0])
@pytest.mark.parametrize("start", [5, 2**40 + 3])
def test_integers_are_the_bits_of_philox(run, check, seed, start):
    y = torch.empty(5, 64).int()
    run(integers_kernel, (1,))(y, seed, start, BLOCK=64)
    offsets = range(start, start + 64)
    right = [*streams(seed, offsets), streams(seed, offsets, 6)[0]]
    check(y, torch.tensor([[signed(v) for v in row] for row in right]))


@triton.jit
def raw_kernel(y_ptr, z_ptr, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.philox(seed, i, i * 3, i + 7, i * 0 + 9)
    tl.store(y_ptr + i, (a ^ b ^ c ^ d).to(tl.int32, bitcast=True))
    k = tl.full((BLOCK,), 11, tl.uint32)
    u = i.to(tl.uint32)
    a, b, c, d = tl.philox_impl(u, u + 1, u + 2, u + 3, k, k + 1, 7)
    tl.store(y_ptr + BLOCK + i, (a ^ b ^ c ^ d).to(tl.int32, bitcast=True))
    w = i.to(tl.uint64) << 33
    k = tl.full((BLOCK,), 13, tl.uint64)
    a, b, c, d = tl.philox_impl(w, w + 1, w + 2, w + 3, k, k << 34)
    tl.store(z_ptr + i, (a ^ b ^ c ^ d).to(tl.int64, bitcast=True))


@pytest.mark.ops("philox", "philox_impl")
@pytest.mark.skipif(not hasattr(tl, "philox_impl"), reason="not in this Triton")
def test_philox_takes_its_counter_and_key(run, check):
    y, z, seed = torch.empty(2, 32).int(), torch.empty(32).long(), 99
    run(raw_kernel, (1,))(y, z, seed, BLOCK=32)

    def xor(words, bits):
        return signed(words[0] ^ words[1] ^ words[2] ^ words[3], bits)

    first = [xor(philox((i, i * 3, i + 7, 9), (seed, 0)), 32) for i in range(32)]
    second = [xor(philox((i, i + 1, i + 2, i + 3), (11, 12), 7), 32) for i in range(32)]
    check(y, torch.tensor([first, second]))
    wide = [tuple((i << 33) + k for k in range(4)) for i in range(32)]
    check(z, torch.tensor([xor(philox(c, (13, 13 << 34), bits=64), 64) for c in wide]))


def uniform(words):
    """Return floats in [0, 1) as Triton makes them."""
    x = torch.tensor([signed(v) for v in words])
    x = torch.where(x < 0, -x - 1, x)
    return x.float() * torch.tensor(4.6566127342e-10)


def normal(u1, u2):
    u1, angle = u1.clamp_min(1e-7), 6.283185307179586 * u2.float()
    radius = (-2 * u1.double().log()).sqrt()
    return radius * angle.double().cos(), radius * angle.double().sin()


@triton.jit
def floats_kernel(y_ptr, z_ptr, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.rand4x(seed, i)
    tl.store(y_ptr + i, a)
    tl.store(y_ptr + BLOCK + i, b)
    tl.store(y_ptr + 2 * BLOCK + i, c)
    tl.store(y_ptr + 3 * BLOCK + i, d)
    tl.store(y_ptr + 4 * BLOCK + i, tl.rand(seed, i))
    tl.store(y_ptr + 5 * BLOCK + i, tl.uint_to_uniform_float(tl.randint(seed, i)))
    n1, n2, n3, n4 = tl.randn4x(seed, i)
    tl.store(z_ptr + i, n1)
    tl.store(z_ptr + BLOCK + i, n2)
    tl.store(z_ptr + 2 * BLOCK + i, n3)
    tl.store(z_ptr + 3 * BLOCK + i, n4)
    tl.store(z_ptr + 4 * BLOCK + i, tl.randn(seed, i))
    m1, m2 = tl.pair_uniform_to_normal(a, b)
    tl.store(z_ptr + 5 * BLOCK + i, m1 + m2)


@pytest.mark.ops(
    *("rand", "rand4x", "randn", "randn4x", "uint_to_uniform_float", "pair_uniform_to_normal")
)
def test_floats_are_made_from_the_bits(run, check):
    y, z, n = torch.empty(6, 1024), torch.empty(6, 1024), 1024
    run(floats_kernel, (1,))(y, z, 42, BLOCK=n)
    u = [uniform(words) for words in streams(42, range(n))]
    check(y, torch.stack([*u, u[0], u[0]]))
    assert y.min() >= 0
    assert y.max() < 1
    pairs = [*normal(u[0], u[1]), *normal(u[2], u[3])]
    # the angle of a float32 is off by 2e-7, the radius at most 6
    check(z, torch.stack([*pairs, pairs[0], pairs[0] + pairs[1]]), atol=1e-5)


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed, n, p, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    keep = tl.rand(seed, i) > p
    tl.store(y_ptr + i, tl.where(keep, x / (1 - p), 0.0), mask=i < n)


@pytest.mark.ops("rand", "where")
def test_dropout_drops_the_same_elements_in_any_blocks(run, check):
    x, y, z = torch.ones(1000), torch.empty(1000), torch.empty(1000)
    run(dropout_kernel, (8,))(x, y, 7, 1000, 0.25, BLOCK=128)
    run(dropout_kernel, (1,))(x, z, 7, 1000, 0.25, BLOCK=1024)
    keep = uniform(streams(7, range(1000))[0]) > 0.25
    check(y, torch.where(keep, 1 / 0.75, 0.0), ulp=1)
    check(z, y, ulp=1)
