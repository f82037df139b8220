"""Casts between all dtypes, the ones that do not fit included, and bits read as another dtype."""

import pytest
import torch
import triton
import triton.language as tl

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FLOATS = [torch.float32, torch.float64, torch.float16]
NO_BFLOAT16 = pytest.mark.no_interpreter("it truncates on the way to bfloat16")
BFLOAT16 = pytest.param(torch.bfloat16, marks=NO_BFLOAT16)
INF, NAN = float("inf"), float("nan")


def as_signed(x):
    return x.view(SIGNED[UNSIGNED.index(x.dtype)]) if x.dtype in UNSIGNED else x


@triton.jit
def to_integers_kernel(x_ptr, u_ptr, a, b, c, d, e, f, g, h, k, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, u = tl.load(x_ptr + i), tl.load(u_ptr + i)
    tl.store(a + i, x.to(tl.int8))
    tl.store(b + i, x.to(tl.int16))
    tl.store(c + i, tl.cast(x, tl.int32))
    tl.store(d + i, x.to(tl.int64))
    tl.store(e + i, u.to(tl.uint8))
    tl.store(f + i, tl.cast(u, tl.uint16))
    tl.store(g + i, u.to(tl.uint32))
    tl.store(h + i, u.to(tl.uint64))
    tl.store(k + i, x.to(tl.int1))


def run_to_integers(run, x, u):
    outputs = [torch.empty(len(x), dtype=dtype) for dtype in [*SIGNED, *UNSIGNED, torch.bool]]
    run(to_integers_kernel, (1,))(x, u, *outputs, BLOCK=len(x))
    return outputs


@pytest.mark.ops("cast")
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED, torch.bool], ids=str)
def test_integers_become_integers_modulo_their_width(run, check, dtype):
    bits = torch.randint(-(2**63), 2**63 - 1, (64,)) >> torch.randint(0, 63, (64,))
    x = bits % 2 == 0 if dtype == torch.bool else as_signed(torch.empty(0, dtype=dtype))
    x = x if dtype == torch.bool else bits.to(x.dtype).view(dtype)
    x[:4] = 0 if dtype == torch.bool else x[:4]
    outputs = run_to_integers(run, x, x)
    wide = as_signed(x).long()
    if dtype in UNSIGNED[:3]:
        wide %= 2 ** (8 * dtype.itemsize)
    for got in outputs[:-1]:
        check(as_signed(got), wide.to(as_signed(got).dtype))
    check(outputs[-1], wide != 0)


@pytest.mark.ops("cast")
@pytest.mark.parametrize("dtype", [*FLOATS, BFLOAT16], ids=str)
def test_floats_become_integers_towards_zero(run, check, dtype):
    x = (torch.randn(64) * 40).clamp(-127, 127).to(dtype)
    x[:6] = torch.tensor([0.0, -0.0, 0.99, -0.99, 1.5, -2.5])
    outputs = run_to_integers(run, x, x.abs())
    for got in outputs[:4]:
        check(got, x.double().trunc())
    for got in outputs[4:8]:
        check(as_signed(got), x.double().abs().trunc())
    check(outputs[-1], x != 0)


@triton.jit
def to_floats_kernel(x_ptr, f16, bf16, f32, f64, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(f16 + i, x.to(tl.float16))
    tl.store(bf16 + i, tl.cast(x, tl.bfloat16))
    tl.store(f32 + i, x.to(tl.float32))
    tl.store(f64 + i, x.to(tl.float64))


@pytest.mark.ops("cast")
@pytest.mark.no_interpreter("it truncates on the way to bfloat16")
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED, torch.bool], ids=str)
def test_integers_become_the_nearest_floats(run, check, dtype):
    bits = torch.randint(-(2**63), 2**63 - 1, (64,)) >> torch.randint(0, 63, (64,))
    signed = torch.int8 if dtype == torch.bool else as_signed(torch.empty(0, dtype=dtype)).dtype
    x = bits % 2 == 0 if dtype == torch.bool else bits.to(signed).view(dtype)
    outputs = [torch.empty(64, dtype=d) for d in (*FLOATS[2:], torch.bfloat16, *FLOATS[:2])]
    run(to_floats_kernel, (1,))(x, *outputs, BLOCK=64)
    values = x.long().tolist() if dtype == torch.bool else x.view(signed).tolist()
    if dtype in UNSIGNED:
        values = [v % 2 ** (8 * dtype.itemsize) for v in values]
    exact = torch.tensor([float(v) for v in values], dtype=torch.float64)
    for got in outputs:
        check(got, exact, ulp=0.501)  # by way of float32 some are rounded twice


@pytest.mark.ops("cast")
@pytest.mark.no_interpreter("it truncates on the way to bfloat16")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16], ids=str)
def test_floats_become_the_nearest_floats(run, check, dtype):
    x = torch.randn(256, dtype=torch.float64) * 2.0 ** torch.randint(-45, 30, (256,))
    special = [0.0, -0.0, INF, -INF, NAN, 65504, 65519, 65520, 1e5, 1e-8, 6e-8, 2**-24, 1e-40, 3e38]
    x[: len(special)] = torch.tensor(special)
    x[32:64] = 1 + torch.arange(32) / 2**9  # ties in bfloat16
    x[64:96] = 1 + torch.arange(32) / 2**12  # ties in float16
    x = x.to(dtype)
    outputs = [torch.empty(256, dtype=d) for d in (*FLOATS[2:], torch.bfloat16, *FLOATS[:2])]
    run(to_floats_kernel, (1,))(x, *outputs, BLOCK=256)
    for got in outputs:
        check(got, x.double(), ulp=0 if dtype == torch.float32 else 0.501)
        zeros = x == 0
        assert torch.equal(got[zeros].signbit(), x[zeros].signbit())


@triton.jit
def standard_floats_kernel(x_ptr, y_ptr, z_ptr, w_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(z_ptr + i, x.to(tl.float16) + y)
    tl.store(w_ptr + i, y.to(tl.float64) * x.to(tl.float64))
    tl.store(w_ptr + BLOCK + i, x)  # a store converts by itself
    tl.store(z_ptr + BLOCK + i, i)


@pytest.mark.ops("cast", "store")
def test_a_store_converts_to_the_dtype_of_its_pointer(run, check):
    x, y = torch.randn(64), torch.randn(64).half()
    z, w = torch.empty(2, 64, dtype=torch.float16), torch.empty(2, 64, dtype=torch.float64)
    run(standard_floats_kernel, (1,))(x, y, z, w, BLOCK=64)
    check(z, torch.stack([x.half() + y, torch.arange(64).half()]))
    check(w, torch.stack([x.double() * y.double(), x.double()]))


@triton.jit
def saturated_kernel(x_ptr, a, b, c, d, e, f, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(a + i, x.to(tl.int8))
    tl.store(b + i, x.to(tl.int16))
    tl.store(c + i, x.to(tl.int32))
    tl.store(d + i, x.to(tl.int64))
    tl.store(e + i, x.to(tl.uint8))
    tl.store(f + i, x.to(tl.uint32))


@pytest.mark.ops("cast")
@pytest.mark.no_interpreter("it leaves to NumPy what does not fit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_floats_that_do_not_fit_saturate(run, check, dtype):
    x = torch.tensor([INF, -INF, NAN, 1e10, -1e10, 3e38, -3e38, 300.7, -300.7, 70000, 2**31, -1.5])
    x = torch.cat([x, torch.tensor([2.0**63, -(2.0**63), 2.0**32, -129.0])]).to(dtype)
    dtypes = [*SIGNED, torch.uint8, torch.uint32]
    outputs = [torch.empty(16, dtype=d) for d in dtypes]
    run(saturated_kernel, (1,))(x, *outputs, BLOCK=16)
    for got, target in zip(outputs, dtypes):
        low, high = torch.iinfo(target).min, torch.iinfo(target).max
        values = [int(v) for v in torch.nan_to_num(x.double()).clamp(-1e30, 1e30).tolist()]
        saturated = torch.tensor([max(low, min(high, v)) for v in values], dtype=target)
        check(as_signed(got), as_signed(saturated))


@triton.jit
def bits_kernel(f_ptr, h_ptr, d_ptr, i_ptr, s_ptr, l_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    f, h, d = tl.load(f_ptr + i), tl.load(h_ptr + i), tl.load(d_ptr + i)
    tl.store(i_ptr + i, f.to(tl.int32, bitcast=True))
    tl.store(s_ptr + i, tl.cast(h, tl.int16, bitcast=True))
    tl.store(l_ptr + i, d.to(tl.int64, bitcast=True))
    turned = f.to(tl.uint32, bitcast=True) ^ 0x80000000
    tl.store(f_ptr + i, turned.to(tl.float32, bitcast=True))
    tl.store(b_ptr + i, h.to(tl.uint16, bitcast=True).to(tl.bfloat16, bitcast=True))
    tl.store(d_ptr + i, ((l_ptr + i).to(tl.int64) - l_ptr.to(tl.int64)).to(tl.float64))


@pytest.mark.ops("cast")
def test_bits_are_read_as_another_dtype(run, check):
    f, h, d = torch.randn(32), torch.randn(32).half(), torch.randn(32).double()
    f[:4], h[:4] = torch.tensor([INF, NAN, 0.0, 1e-40]), torch.tensor([INF, -INF, -0.0, 1e-7])
    i, s, l = (torch.empty(32, dtype=d) for d in (torch.int32, torch.int16, torch.int64))
    b = torch.empty(32, dtype=torch.bfloat16)
    right = [f.view(torch.int32), h.view(torch.int16), d.view(torch.int64)]
    right = [r.clone() for r in right] + [-f, h.view(torch.bfloat16)]
    run(bits_kernel, (1,))(f, h, d, i, s, l, b, BLOCK=32)
    for got, expected in zip((i, s, l, f, b), right):
        check(got, expected)
    check(d, torch.arange(32).double() * 8)


@triton.jit
def towards_zero_kernel(x_ptr, h_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(h_ptr + i, x.to(tl.float16, fp_downcast_rounding="rtz"))
    tl.store(b_ptr + i, x.to(tl.bfloat16, fp_downcast_rounding="rtz"))
    tl.store(b_ptr + BLOCK + i, x.to(tl.bfloat16, fp_downcast_rounding="rtne"))


@pytest.mark.ops("cast")
@pytest.mark.no_interpreter("it gets subnormals of float16 wrong")
def test_rounding_towards_zero(run, check):
    x = torch.randn(128) * 2.0 ** torch.randint(-20, 14, (128,))
    h, b = torch.empty(128).half(), torch.empty(2, 128).bfloat16()
    run(towards_zero_kernel, (1,))(x, h, b, BLOCK=128)
    cut = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    check(b, torch.stack([cut, x.bfloat16().float()]))
    nearest = x.half().float()
    down = torch.where(nearest.abs() > x.abs(), torch.nextafter(x.half(), x.half() * 0), x.half())
    check(h, down)


@triton.jit
def from_eight_bits_kernel(x_ptr, h_ptr, b_ptr, f_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(h_ptr + i, x.to(tl.float16))
    tl.store(b_ptr + i, x.to(tl.bfloat16))
    tl.store(f_ptr + i, x.to(tl.float32))


@pytest.mark.ops("cast", "float8e4nv", "float8e5", "float8e4b8", "float8e5b16")
@pytest.mark.no_interpreter("it has no NaN in float8")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_floats_of_8_bits_become_wider(run, check, dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    outputs = [torch.empty(256, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32)]
    run(from_eight_bits_kernel, (1,))(x, *outputs, BLOCK=256)
    for got in outputs:
        check(got, x.double())


@triton.jit
def to_eight_bits_kernel(h_ptr, f_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(f_ptr + i).to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + BLOCK + i, tl.load(h_ptr + i).to(y_ptr.dtype.element_ty))
    half = tl.load(f_ptr + i).to(tl.bfloat16)
    tl.store(y_ptr + 2 * BLOCK + i, half.to(y_ptr.dtype.element_ty))


@pytest.mark.ops("cast", "float8e4nv", "float8e5", "float8e4b8", "float8e5b16")
@pytest.mark.no_interpreter("it rounds ties away from zero")
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_floats_become_the_nearest_of_8_bits(run, check, dtype):
    largest = torch.finfo(dtype).max
    x = (
        (torch.randn(256) * 2.0 ** torch.randint(-18, 7, (256,)))
        .clamp(-largest, largest)
        .bfloat16()
    )
    x[:64] = 1 + torch.arange(64).bfloat16() / 32  # every other one is a tie
    x[64:70] = torch.tensor([0.0, -0.0, NAN, 2**-9, 2**-10, 2**-17])
    y = torch.empty(3, 256, dtype=dtype)
    run(to_eight_bits_kernel, (1,))(x.half(), x.float(), y, BLOCK=256)
    halves = torch.stack([x.float(), x.half().float(), x.float()]).to(dtype)
    check(y.float(), halves.float())


@pytest.mark.ops("cast", "float8e4nv", "float8e5")
@pytest.mark.no_interpreter("it keeps the low bits of what does not fit")
@pytest.mark.parametrize("dtype", EIGHT_BITS[:2], ids=str)
def test_floats_that_do_not_fit_into_8_bits_saturate(run, check, dtype):
    x, largest = (
        torch.tensor([1e6, -1e6, INF, -INF, 500.0, 6e4, 449.0, 2.0]),
        torch.finfo(dtype).max,
    )
    y = torch.empty(3, 8, dtype=dtype)
    run(to_eight_bits_kernel, (1,))(x.half(), x, y, BLOCK=8)
    check(y.float(), x.clamp(-largest, largest).to(dtype).float().expand(3, 8))


@triton.jit
def old_float8_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float8e4b15, bitcast=True)
    tl.store(y_ptr + i, x.to(tl.float32))


@pytest.mark.refused("float8e4b15", "a format of one old GPU, which Triton converts in assembly")
def test_the_float8_of_old_gpus_is_not_converted(run):
    with pytest.raises(triton.CompilationError, match="conversion for this type"):
        run(old_float8_kernel, (1,))(torch.ones(16).to(torch.uint8), torch.empty(16), BLOCK=16)


@triton.jit
def eight_bits_arithmetic_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    z = x.to(tl.float32) * 2 + y.to(tl.float32)
    tl.store(z_ptr + i, z)
    tl.store(y_ptr + i, tl.where(z > 0, x, y))
    tl.store(x_ptr + i, x.to(tl.uint8, bitcast=True).to(tl.float8e5, bitcast=True).to(tl.float32))


@pytest.mark.ops("cast", "where")
@pytest.mark.no_interpreter("it rounds ties away from zero")
def test_floats_of_8_bits_are_values_like_others(run, check):
    dtype = torch.float8_e5m2
    x, y, z = torch.randn(64).to(dtype), torch.randn(64).to(dtype), torch.empty(64)
    right = x.float() * 2 + y.float()
    chosen, kept = torch.where(right > 0, x.float(), y.float()), x.clone()
    run(eight_bits_arithmetic_kernel, (1,))(x, y, z, BLOCK=64)
    check(z, right)
    check(y.float(), chosen)
    check(x.float(), kept.float())
