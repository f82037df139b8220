"""Elementwise mathematics of floats."""

import pytest
import torch
import triton
import triton.language as tl

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, -1e-40, 3e38, -3e38, 0.5, -0.5, 1.5, 2.5]
WIDE = [torch.float32, torch.float64]


def everywhere(n, dtype, *, low=-30, high=30):
    """Return n values of either sign with exponents from low to high, and the special ones."""
    x = torch.randn(n, dtype=torch.float64) * 2.0 ** torch.randint(low, high, (n,))
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype)


@triton.jit
def rows(y_ptr, row, BLOCK: tl.constexpr):
    return y_ptr + row * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def exponentials_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(rows(x_ptr, 0, BLOCK))
    tl.store(rows(y_ptr, 0, BLOCK), tl.exp(x))
    tl.store(rows(y_ptr, 1, BLOCK), tl.exp2(x))
    tl.store(rows(y_ptr, 2, BLOCK), tl.log(x))
    tl.store(rows(y_ptr, 3, BLOCK), tl.log2(x))


@pytest.mark.ops("exp", "exp2", "log", "log2")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_exponentials_and_logarithms(run, check, dtype):
    x, y = everywhere(1024, dtype, low=-40, high=8), torch.empty(4, 1024, dtype=dtype)
    x[512:] = torch.linspace(-110, 140, 512, dtype=dtype)
    run(exponentials_kernel, (1,))(x, y, BLOCK=1024)
    exact = x.double()
    check(y[0], exact.exp(), ulp=2)
    check(y[1], exact.exp2(), ulp=2)
    check(y[2], exact.log(), ulp=2)
    check(y[3], exact.log2(), ulp=2)


@triton.jit
def circles_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(rows(x_ptr, 0, BLOCK))
    tl.store(rows(y_ptr, 0, BLOCK), tl.sin(x))
    tl.store(rows(y_ptr, 1, BLOCK), tl.cos(x))
    tl.store(rows(y_ptr, 2, BLOCK), tl.erf(x))
    tl.store(rows(y_ptr, 3, BLOCK), tl.sigmoid(x))


@pytest.mark.ops("sin", "cos", "erf", "sigmoid")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_circular_and_error_functions(run, check, dtype):
    x, y = everywhere(1024, dtype, low=-20, high=20), torch.empty(4, 1024, dtype=dtype)
    x[512:] = torch.linspace(-20, 20, 512, dtype=dtype)
    run(circles_kernel, (1,))(x, y, BLOCK=1024)
    exact = x.double()
    check(y[0], exact.sin(), ulp=4)
    check(y[1], exact.cos(), ulp=4)
    check(y[2], exact.erf(), ulp=4)
    # exp(-x) overflows below -88, where the result is 0 instead of a subnormal
    check(y[3], exact.sigmoid(), ulp=4, atol=1e-38)


@triton.jit
def roots_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(rows(x_ptr, 0, BLOCK))
    tl.store(rows(y_ptr, 0, BLOCK), tl.sqrt(x))
    tl.store(rows(y_ptr, 1, BLOCK), tl.rsqrt(x))
    tl.store(rows(y_ptr, 2, BLOCK), tl.abs(x))
    tl.store(rows(y_ptr, 3, BLOCK), tl.floor(x))
    tl.store(rows(y_ptr, 4, BLOCK), tl.ceil(x))
    tl.store(rows(y_ptr, 5, BLOCK), -x)


@pytest.mark.ops("sqrt", "rsqrt", "abs", "floor", "ceil")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_roots_and_roundings(run, check, dtype):
    x, y = everywhere(256, dtype), torch.empty(6, 256, dtype=dtype)
    run(roots_kernel, (1,))(x, y, BLOCK=256)
    exact = x.double()
    check(y[0], exact.sqrt(), ulp=1)
    check(y[1], exact.rsqrt(), ulp=2)
    check(y[2:], torch.stack([x.abs(), x.floor(), x.ceil(), -x]))


@triton.jit
def precise_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), tl.sqrt_rn(x))
    tl.store(rows(z_ptr, 1, BLOCK), tl.div_rn(x, y))
    tl.store(rows(z_ptr, 2, BLOCK), tl.fdiv(x, y, ieee_rounding=True))


@pytest.mark.ops("sqrt_rn", "div_rn", "fdiv")
def test_correctly_rounded_operations(run, check):
    x, y, z = everywhere(256, torch.float32), torch.randn(256), torch.empty(3, 256)
    run(precise_kernel, (1,))(x, y, z, BLOCK=256)
    x, y = x.double(), y.double()  # rounded twice, which makes no difference to these
    check(z, torch.stack([x.sqrt(), x / y, x / y]))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), x + y)
    tl.store(rows(z_ptr, 1, BLOCK), x - y)
    tl.store(rows(z_ptr, 2, BLOCK), x * y)
    tl.store(rows(z_ptr, 3, BLOCK), x / y)
    tl.store(rows(z_ptr, 4, BLOCK), x % y)
    tl.store(rows(z_ptr, 5, BLOCK), tl.fdiv(y, x))
    tl.store(rows(z_ptr, 6, BLOCK), 2 - x)
    tl.store(rows(z_ptr, 7, BLOCK), 0.5 * y + 1)
    tl.store(rows(z_ptr, 8, BLOCK), 1 / y)
    tl.store(rows(z_ptr, 9, BLOCK), tl.add(x, 1) + tl.sub(x, y) + tl.mul(y, 3))


ARITHMETIC = [
    *(torch.add, torch.sub, torch.mul, torch.div, torch.fmod),
    *(lambda x, y: y / x, lambda x, y: 2 - x, lambda x, y: 0.5 * y + 1, lambda x, y: 1 / y),
    lambda x, y: (x + 1) + (x - y) + (y * 3),
]
NO_BFLOAT16 = pytest.mark.no_interpreter("bfloat16 is an integer to it")


@pytest.mark.ops("tensor", "add", "sub", "mul", "fdiv")
@pytest.mark.parametrize(
    "dtype",
    [*WIDE, torch.float16, pytest.param(torch.bfloat16, marks=NO_BFLOAT16)],
    ids=str,
)
def test_arithmetic_in_every_float(run, check, dtype):
    x, y = everywhere(256, dtype, low=-4, high=4), everywhere(256, dtype, low=-4, high=4)
    y, z = y.flip(0), torch.empty(10, 256, dtype=dtype)
    run(arithmetic_kernel, (1,))(x, y, z, BLOCK=256)
    x, y = x.double(), y.double()
    # sums of products cancel, and may be contracted to one rounding
    cancelled = torch.nan_to_num(x.abs() + y.abs() + 2, posinf=0) * torch.finfo(dtype).eps * 8
    for row, (got, function) in enumerate(zip(z, ARITHMETIC)):
        check(got, function(x, y), ulp=1, atol=cancelled if row in (7, 9) else 0.0)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, w_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    z = tl.load(rows(z_ptr, 0, BLOCK))
    tl.store(rows(w_ptr, 0, BLOCK), tl.fma(x, y, z))
    tl.store(rows(w_ptr, 1, BLOCK), tl.math.fma(x, y, -(x * y)))


@pytest.mark.ops("fma")
@pytest.mark.no_interpreter("it rounds twice")
def test_a_fused_product_rounds_once(run, check):
    x, y, z, w = torch.randn(128), torch.randn(128), torch.randn(128), torch.empty(2, 128)
    run(fma_kernel, (1,))(x, y, z, w, BLOCK=128)
    check(w[0], x.double() * y.double() + z.double())  # the product of two floats is a double
    check(w[1], x.double() * y.double() - (x * y).double())


@triton.jit
def softmax_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, tl.softmax(x))
    tl.store(y_ptr + M * N + place, tl.softmax(x, dim=1, keep_dims=True))
    row = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + 2 * M * N + tl.arange(0, N), tl.softmax(row, ieee_rounding=True))


@pytest.mark.ops("softmax")
def test_softmax_along_either_axis(run, check):
    x, y = torch.randn(8, 16) * 5, torch.empty(17, 16)
    run(softmax_kernel, (1,))(x, y, M=8, N=16)
    x = x.double()
    # the error of x - max(x), which is up to 30
    check(y, torch.cat([x.softmax(0), x.softmax(1), x[:1].softmax(1)]), ulp=40)


@triton.jit
def extremes_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), tl.maximum(x, y))
    tl.store(rows(z_ptr, 1, BLOCK), tl.minimum(x, y))
    tl.store(rows(z_ptr, 2, BLOCK), tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(rows(z_ptr, 3, BLOCK), tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(rows(z_ptr, 4, BLOCK), tl.clamp(x, -1.0, 1.0))
    tl.store(rows(z_ptr, 5, BLOCK), tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


def extremes(x, y):
    clamped = x.clamp(-1, 1)
    return torch.stack([
        *(torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), torch.minimum(x, y)),
        *(torch.where(x.isnan(), -1.0, clamped), clamped),
    ])  # fmt: skip


@pytest.mark.ops("PropagateNan", "maximum", "minimum", "clamp")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.no_interpreter("it propagates NaN always")
def test_extremes_with_and_without_nan(run, check, dtype):
    x, y = everywhere(256, dtype), everywhere(256, dtype).roll(3)
    z = torch.empty(6, 256, dtype=dtype)
    run(extremes_kernel, (1,))(x, y, z, BLOCK=256)
    check(z, extremes(x, y))


@pytest.mark.ops("maximum", "minimum", "clamp")
@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_extremes_of_numbers(run, check, dtype):
    x, y, z = torch.randn(256).to(dtype), torch.randn(256).to(dtype), torch.empty(6, 256).to(dtype)
    run(extremes_kernel, (1,))(x, y, z, BLOCK=256)
    check(z, extremes(x, y))


@triton.jit
def comparisons_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), x < y)
    tl.store(rows(z_ptr, 1, BLOCK), x <= y)
    tl.store(rows(z_ptr, 2, BLOCK), x > y)
    tl.store(rows(z_ptr, 3, BLOCK), x >= y)
    tl.store(rows(z_ptr, 4, BLOCK), x == y)
    tl.store(rows(z_ptr, 5, BLOCK), x != y)
    tl.store(rows(z_ptr, 6, BLOCK), (x < y) | (x != x))
    tl.store(rows(z_ptr, 7, BLOCK), (x < 1) & (y < 1))
    tl.store(rows(z_ptr, 8, BLOCK), (x < y) ^ (x < 0))
    tl.store(rows(z_ptr, 9, BLOCK), ~(x < y))
    tl.store(rows(z_ptr, 10, BLOCK), tl.where(x != x, 1, 0) + (x == y).to(tl.int32) * 2)
    tl.store(rows(z_ptr, 11, BLOCK), (x < y).logical_and(y > 0) + (x > y).logical_or(y < 0) * 2)


@pytest.mark.ops("tensor", "where")
@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_comparisons_with_nan_and_infinity(run, check, dtype):
    x, y = everywhere(256, dtype), everywhere(256, dtype).roll(2)
    x[200:] = y[200:]
    z = torch.empty(12, 256, dtype=torch.int32)
    run(comparisons_kernel, (1,))(x, y, z, BLOCK=256)
    right = [x < y, x <= y, x > y, x >= y, x == y, x != y, (x < y) | (x != x), (x < 1) & (y < 1)]
    right += [(x < y) ^ (x < 0), ~(x < y), x.isnan().int() + (x == y).int() * 2]
    right += [((x < y) & (y > 0)).int() + ((x > y) | (y < 0)).int() * 2]
    check(z, torch.stack([r.int() for r in right]))


@triton.jit
def bfloat16_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    tl.store(rows(z_ptr, 0, BLOCK), tl.where(x > y, x, y))
    tl.store(rows(z_ptr, 1, BLOCK), tl.maximum(x, y))
    tl.store(rows(z_ptr, 2, BLOCK), -x)
    tl.store(rows(z_ptr, 3, BLOCK), tl.abs(x))
    tl.store(rows(z_ptr, 4, BLOCK), (x < y).to(tl.bfloat16))
    tl.store(rows(z_ptr, 5, BLOCK), tl.sum(x, 0).to(tl.bfloat16))
    tl.store(rows(z_ptr, 6, BLOCK), (x * y + x).to(tl.bfloat16))


@pytest.mark.ops("maximum", "abs", "sum", "where")
@pytest.mark.no_interpreter("bfloat16 is an integer to it")
def test_bfloat16_is_a_float(run, check):
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    z = torch.empty(7, 64, dtype=torch.bfloat16)
    run(bfloat16_kernel, (1,))(x, y, z, BLOCK=64)
    larger = torch.maximum(x, y)
    check(z[:5], torch.stack([larger, larger, -x, x.abs(), (x < y).bfloat16()]))
    # every sum is rounded to bfloat16
    steps = x.double().abs().sum() * torch.finfo(torch.bfloat16).eps * 6
    check(z[5], x.double().sum().expand(64), atol=steps.item())
    check(z[6], (x * y).double() + x.double(), ulp=1, atol=0.01)


@triton.jit
def promotion_kernel(h_ptr, f_ptr, i_ptr, y_ptr, BLOCK: tl.constexpr):
    h, f = tl.load(rows(h_ptr, 0, BLOCK)), tl.load(rows(f_ptr, 0, BLOCK))
    i = tl.load(rows(i_ptr, 0, BLOCK))
    tl.store(rows(y_ptr, 0, BLOCK), h + f)
    tl.store(rows(y_ptr, 1, BLOCK), h * i)  # float16 times int32 is float16
    tl.store(rows(y_ptr, 2, BLOCK), i / 4)
    tl.store(rows(y_ptr, 3, BLOCK), f + i)
    tl.store(rows(y_ptr, 4, BLOCK), h + 1.5)
    tl.store(rows(y_ptr, 5, BLOCK), i / i)
    tl.store(rows(y_ptr, 6, BLOCK), (f > 0) + i)


@pytest.mark.ops("tensor", "add", "mul")
def test_mixed_operands_are_promoted(run, check):
    h, f = torch.randn(64).half(), torch.randn(64)
    i, y = torch.randint(1, 50, (64,), dtype=torch.int32), torch.empty(7, 64)
    run(promotion_kernel, (1,))(h, f, i, y, BLOCK=64)
    right = [h.float() + f, h.double() * i, i / 4, f + i, (h + 1.5).float(), i / i, (f > 0) + i]
    for row, (got, expected) in enumerate(zip(y, right)):
        check(got, expected, atol=0.1 if row == 1 else 0.0)


@triton.jit
def members_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x, y = tl.load(rows(x_ptr, 0, BLOCK)), tl.load(rows(y_ptr, 0, BLOCK))
    z = x.abs().sqrt().exp().log() + x.sin() * x.cos() + (x.abs() + 1).rsqrt()
    z += x.sigmoid() + x.softmax() + tl.math.floor(x)
    rows(z_ptr, 0, BLOCK).store(z)
    tl.store(rows(z_ptr, 1, BLOCK), max(x, y) + min(x, 2.0))
    tl.store(rows(z_ptr, 2, BLOCK), not (x < y))
    tl.store(rows(z_ptr, 3, BLOCK), y.min(0) + x.max() + x.sum(axis=0) + x)


@pytest.mark.ops(
    "tensor", "sqrt", "exp", "log", "sin", "cos", "rsqrt", "sigmoid", "softmax", "store"
)
@pytest.mark.no_interpreter("it has neither member functions nor Python's max, min and not")
def test_members_and_builtins_are_the_same_functions(run, check):
    x, y, z = torch.randn(64), torch.randn(64), torch.empty(4, 64)
    run(members_kernel, (1,))(x, y, z, BLOCK=64)
    x, y = x.double(), y.double()
    first = x.abs().sqrt() + x.sin() * x.cos() + (x.abs() + 1).rsqrt() + x.sigmoid()
    check(z[0], first + x.softmax(0) + x.floor(), atol=2e-6)
    check(z[1], torch.maximum(x, y) + x.clamp(max=2), atol=1e-6)
    check(z[2], (x >= y).float())
    check(z[3], x + y.min() + x.max() + x.sum(), atol=1e-5)
