"""Integers of every width: they wrap, divide towards zero and shift by their sign."""

import pytest
import torch
import triton
import triton.language as tl

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def width(dtype):
    return dtype.itemsize * 8


def exact(x):
    """Return a list of Python integers."""
    bits = width(x.dtype)
    if x.dtype in SIGNED:
        return x.tolist()
    return [v % 2**bits for v in x.view(SIGNED[UNSIGNED.index(x.dtype)]).tolist()]


def tensor(values, dtype):
    """Return Python integers, wrapped, as a tensor of the signed dtype of that width."""
    bits = width(dtype)
    wrapped = [(v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for v in values]
    return torch.tensor(wrapped, dtype=getattr(torch, f"int{bits}"))


def operands(dtype):
    """Return values of any bits, the extremes among them; no zero in the second."""
    bits = width(dtype)
    n = 256
    x = torch.randint(-(2**63), 2**63 - 1, (n,)) >> torch.randint(0, 64, (n,))
    y = torch.randint(-(2**63), 2**63 - 1, (n,)) >> torch.randint(0, 64, (n,))
    edges = [0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 2]
    x[:6] = torch.tensor(edges)
    y[2:8] = torch.tensor(edges)
    x, y = tensor(x.tolist(), dtype), tensor(y.tolist(), dtype)
    y[y == 0] = 3
    y[(y == -1) & (x == -(2 ** (bits - 1)))] = 5  # the quotient that does not fit
    return x.view(dtype), y.view(dtype)


@triton.jit
def rows(y_ptr, row, BLOCK: tl.constexpr):
    return y_ptr + row * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def integers_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), x + y)
    tl.store(rows(z_ptr, 1, BLOCK), x - y)
    tl.store(rows(z_ptr, 2, BLOCK), x * y)
    tl.store(rows(z_ptr, 3, BLOCK), x // y)
    tl.store(rows(z_ptr, 4, BLOCK), x % y)
    tl.store(rows(z_ptr, 5, BLOCK), x & y)
    tl.store(rows(z_ptr, 6, BLOCK), x | y)
    tl.store(rows(z_ptr, 7, BLOCK), x ^ y)
    tl.store(rows(z_ptr, 8, BLOCK), x ^ 1)
    tl.store(rows(z_ptr, 9, BLOCK), tl.maximum(x, y))
    tl.store(rows(z_ptr, 10, BLOCK), tl.minimum(x, y))
    tl.store(rows(z_ptr, 11, BLOCK), tl.where(x < y, x, y - 1))
    tl.store(rows(z_ptr, 12, BLOCK), x // 7 + x % 7)
    tl.store(rows(z_ptr, 13, BLOCK), tl.mul(x, x) + tl.add(x, 1) - tl.sub(y, 2))


def divided(x, y):
    """Divide towards zero."""
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def remainder(x, y):
    return x - divided(x, y) * y


INTEGER_ROWS = [
    *(lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, divided, remainder),
    *(lambda x, y: x & y, lambda x, y: x | y, lambda x, y: x ^ y, lambda x, y: x ^ 1, max, min),
    lambda x, y: x if x < y else y - 1,
    lambda x, y: divided(x, 7) + remainder(x, 7),
    lambda x, y: x * x + x + 1 - y + 2,
]


@pytest.mark.ops("tensor", "add", "sub", "mul", "maximum", "minimum", "where")
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED], ids=str)
def test_integers_wrap_and_divide_towards_zero(run, check, dtype):
    x, y = operands(dtype)
    z = torch.empty(14, 256, dtype=dtype)
    run(integers_kernel, (1,))(x, y, z, BLOCK=256)
    z = z.view(tensor([0], dtype).dtype)
    for got, function in zip(z, INTEGER_ROWS):
        check(got, tensor(map(function, exact(x), exact(y)), dtype))


@triton.jit
def shifts_kernel(x_ptr, s_ptr, z_ptr, BLOCK: tl.constexpr):
    x, s = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(s_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), x << s)
    tl.store(rows(z_ptr, 1, BLOCK), x >> s)
    tl.store(rows(z_ptr, 2, BLOCK), (x << 3) >> 2)
    tl.store(rows(z_ptr, 3, BLOCK), (x >> 2) & 3)


@pytest.mark.ops("tensor", "add")
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED], ids=str)
def test_shifts_follow_the_sign(run, check, dtype):
    x, _ = operands(dtype)
    s, z = torch.randint(0, width(dtype), (256,)).to(dtype), torch.empty(4, 256, dtype=dtype)
    run(shifts_kernel, (1,))(x, s, z, BLOCK=256)
    z, values, steps = z.view(tensor([0], dtype).dtype), exact(x), exact(s)
    check(z[0], tensor([v << k for v, k in zip(values, steps)], dtype))
    check(z[1], tensor([v >> k for v, k in zip(values, steps)], dtype))

    def wrapped(v):
        low = v % 2 ** width(dtype)
        return low - 2 ** width(dtype) if dtype in SIGNED and low >> (width(dtype) - 1) else low

    check(z[2], tensor([wrapped(v << 3) >> 2 for v in values], dtype))
    check(z[3], tensor([(v >> 2) & 3 for v in values], dtype))


@triton.jit
def compared_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), x < y)
    tl.store(rows(z_ptr, 1, BLOCK), x <= y)
    tl.store(rows(z_ptr, 2, BLOCK), x > y)
    tl.store(rows(z_ptr, 3, BLOCK), x >= y)
    tl.store(rows(z_ptr, 4, BLOCK), x == y)
    tl.store(rows(z_ptr, 5, BLOCK), x != y)
    tl.store(rows(z_ptr, 6, BLOCK), (x + y < x) & (x * 3 > y))  # sums that wrapped


@pytest.mark.ops("tensor", "where")
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED], ids=str)
def test_integers_are_compared_by_their_sign(run, check, dtype):
    x, y = operands(dtype)
    y.view(torch.int8).view(256, -1)[128:192] = x.view(torch.int8).view(256, -1)[128:192]
    z = torch.empty(7, 256, dtype=torch.int8)
    run(compared_kernel, (1,))(x, y, z, BLOCK=256)
    bits, signed = width(dtype), dtype in SIGNED

    def wrap(v):
        return (v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) if signed else v % 2**bits

    right = [
        *(int.__lt__, int.__le__, int.__gt__, int.__ge__, int.__eq__, int.__ne__),
        lambda a, b: wrap(a + b) < a and wrap(a * 3) > b,
    ]
    pairs = list(zip(exact(x), exact(y)))
    for got, function in zip(z, right):
        check(got, torch.tensor([int(function(a, b)) for a, b in pairs]))


@triton.jit
def inverted_kernel(x_ptr, z_ptr, BLOCK: tl.constexpr):
    x = tl.load(rows(x_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), ~x)


@pytest.mark.parametrize("dtype", SIGNED, ids=str)
def test_every_bit_is_inverted(run, check, dtype):
    x, _ = operands(dtype)
    z = torch.empty(1, 256, dtype=dtype)
    run(inverted_kernel, (1,))(x, z, BLOCK=256)
    check(z[0], ~x)


@pytest.mark.no_interpreter("it has no all-ones value of an unsigned dtype")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint32], ids=str)
def test_every_unsigned_bit_is_inverted(run, check, dtype):
    x, _ = operands(dtype)
    z = torch.empty(1, 256, dtype=dtype)
    run(inverted_kernel, (1,))(x, z, BLOCK=256)
    signed = tensor([0], dtype).dtype
    check(z[0].view(signed), ~x.view(signed))


@triton.jit
def absolute_kernel(x_ptr, z_ptr, BLOCK: tl.constexpr):
    x = tl.load(rows(x_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), tl.abs(x))
    tl.store(rows(z_ptr, 1, BLOCK), -x)
    tl.store(rows(z_ptr, 2, BLOCK), tl.clamp(x.to(tl.float32), -9.0, 9.0).to(tl.int32))


@pytest.mark.ops("abs", "clamp")
@pytest.mark.parametrize("dtype", SIGNED, ids=str)
def test_absolute_values_wrap(run, check, dtype):
    x, _ = operands(dtype)
    z = torch.empty(3, 256, dtype=dtype)
    run(absolute_kernel, (1,))(x, z, BLOCK=256)
    values = exact(x)
    for got, function in zip(z, [abs, int.__neg__, lambda v: max(-9, min(9, v))]):
        check(got, tensor(map(function, values), dtype))


@triton.jit
def high_half_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), tl.umulhi(x, y))


@pytest.mark.ops("umulhi")
@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint64], ids=str)
def test_the_high_half_of_a_product(run, check, dtype):
    x, y = operands(dtype)
    z = torch.empty(1, 256, dtype=dtype)
    run(high_half_kernel, (1,))(x, y, z, BLOCK=256)
    products = [a * b >> width(dtype) for a, b in zip(exact(x), exact(y))]
    check(z.view(tensor([0], dtype).dtype)[0], tensor(products, dtype))


@triton.jit
def mixed_kernel(a_ptr, b_ptr, c_ptr, z_ptr, BLOCK: tl.constexpr):
    a, b = tl.load(rows(a_ptr, 0, BLOCK)), tl.load(rows(b_ptr, 0, BLOCK))
    c = tl.load(rows(c_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), a + b)  # int8 + int16
    tl.store(rows(z_ptr, 1, BLOCK), b + c)  # int16 + uint8
    tl.store(rows(z_ptr, 2, BLOCK), a * 100)  # int8 wraps
    tl.store(rows(z_ptr, 3, BLOCK), a.to(tl.int32) * c)
    tl.store(rows(z_ptr, 4, BLOCK), (c << 1) + 1)  # uint8 wraps


@pytest.mark.ops("add", "mul")
def test_integers_of_two_widths_meet_in_the_wider(run, check):
    a = torch.randint(-128, 128, (64,), dtype=torch.int8)
    b = torch.randint(-(2**15), 2**15, (64,), dtype=torch.int16)
    c, z = torch.randint(0, 256, (64,), dtype=torch.uint8), torch.empty(5, 64, dtype=torch.int64)
    run(mixed_kernel, (1,))(a, b, c, z, BLOCK=64)
    A, B, C = a.long(), b.long(), c.long()
    sums = [(A + B).short().long(), (B + C).short().long()]
    check(z, torch.stack([*sums, (A * 100).char().long(), A * C, (C * 2 + 1) % 256]))


@triton.jit
def booleans_kernel(m_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = tl.load(m_ptr + i)  # a bool tensor: int1
    odd = i % 2 == 1
    tl.store(z_ptr + i, m & odd)
    tl.store(z_ptr + BLOCK + i, m | odd)
    tl.store(z_ptr + 2 * BLOCK + i, m ^ odd)
    tl.store(z_ptr + 3 * BLOCK + i, ~m)
    tl.store(z_ptr + 4 * BLOCK + i, tl.where(m, i, -i) > 4)
    tl.store(z_ptr + 5 * BLOCK + i, m == odd)
    tl.store(z_ptr + 6 * BLOCK + i, tl.sum(m.to(tl.int32), 0) > 8)


@pytest.mark.ops("where", "load", "store")
def test_booleans_are_stored_and_combined(run, check):
    m, z = torch.randint(0, 2, (16,)).bool(), torch.empty(7, 16, dtype=torch.bool)
    run(booleans_kernel, (1,))(m, z, BLOCK=16)
    i = torch.arange(16)
    odd = i % 2 == 1
    rows_ = [m & odd, m | odd, m ^ odd, ~m, torch.where(m, i, -i) > 4, m == odd]
    check(z, torch.stack([*rows_, (m.sum() > 8).expand(16)]))
