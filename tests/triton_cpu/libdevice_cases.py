"""What each function of libdevice computes: its name, its inputs, and the right results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import mpmath
import torch
from torch import Tensor

N = 64  # elements of each input
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
DIRECTIONS = ("rn", "rz", "rd", "ru")


@dataclass(frozen=True)
class Case:
    """One overload of a function."""

    name: str
    inputs: tuple[Tensor, ...]
    result: torch.dtype
    expected: Tensor  # float64 or integers
    unsigned: bool = False  # the inputs are handed over as unsigned integers
    ulp: float = 0.0  # of float results
    least: float = 0.0  # the unit in the last place is that of a number as large as this at least

    @property
    def key(self) -> str:
        kinds = "-".join(str(x.dtype)[6:] for x in self.inputs)
        return f"{self.name}-{'u' if self.unsigned else ''}{kinds}"


def wide() -> Tensor:
    return torch.randn(N, dtype=F64) * 2.0 ** torch.randint(-6, 4, (N,))


def positive() -> Tensor:
    return wide().abs()


def between(low: float, high: float) -> Callable[[], Tensor]:
    return lambda: torch.rand(N, dtype=F64) * (high - low) + low


def special() -> Tensor:
    x = wide()
    x[:12] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0])
    return x


def halves() -> Tensor:
    return torch.arange(N, dtype=F64) / 2 - 15


def away(x: Tensor) -> Tensor:
    """Round halves away from zero."""
    return torch.where(x.isfinite(), torch.copysign((x.abs() + 0.5).floor(), x), x)


def exponent(x: Tensor) -> Tensor:
    return torch.frexp(x)[1] - 1


def once_rounded(x: float, y: float, z: float) -> float:
    """Return x y + z, exact but for the last rounding."""
    return float(Fraction(x) * Fraction(y) + Fraction(z))


def by_value(function: Callable[..., float]) -> Callable[..., Tensor]:
    """Turn a function of Python's or mpmath's numbers into one of tensors."""

    def of_tensors(*x: Tensor) -> Tensor:
        values = (float(function(*v)) for v in zip(*(part.tolist() for part in x)))
        return torch.tensor(list(values), dtype=F64)

    return of_tensors


# name: inputs, function, units in the last place, and of how large a number at least
FLOATS: dict[str, tuple] = {
    "abs": (special, torch.abs, 0),
    "acos": (between(-1, 1), torch.acos, 4, 0.01),
    "acosh": (between(1, 50), torch.acosh, 8, 0.1),
    "asin": (between(-1, 1), torch.asin, 4),
    "asinh": (wide, torch.asinh, 8),
    "atan": (special, torch.atan, 4),
    "atanh": (between(-1, 1), torch.atanh, 8),
    "cbrt": (wide, lambda x: torch.copysign(x.abs() ** (1 / 3), x), 4),
    "ceil": (special, torch.ceil, 0),
    "cos": (wide, torch.cos, 4, 1e-3),
    "cosh": (wide, torch.cosh, 8),
    "cospi": (between(-2, 2), lambda x: (x * math.pi).cos(), 8, 1.0),
    "cyl_bessel_i0": (between(-9, 9), torch.special.i0, 16),
    "cyl_bessel_i1": (between(-9, 9), torch.special.i1, 16),
    "erf": (wide, torch.erf, 4),
    "erfc": (between(-3, 5), torch.erfc, 16),
    "erfcinv": (between(0.1, 1.9), lambda x: torch.erfinv(1 - x), 32, 0.1),
    "erfcx": (between(-2, 20), torch.special.erfcx, 32),
    "erfinv": (between(-0.99, 0.99), torch.erfinv, 16),
    "exp": (special, torch.exp, 4),
    "exp10": (between(-20, 20), lambda x: 10.0**x, 16),
    "exp2": (special, torch.exp2, 4),
    "expm1": (wide, torch.expm1, 4),
    "floor": (special, torch.floor, 0),
    "j0": (between(0, 20), by_value(lambda x: mpmath.besselj(0, x)), 16, 1.0),
    "j1": (between(0, 20), by_value(lambda x: mpmath.besselj(1, x)), 16, 1.0),
    "lgamma": (between(0.2, 40), torch.lgamma, 16, 1.0),
    "log": (positive, torch.log, 4, 0.1),
    "log10": (positive, torch.log10, 4, 0.1),
    "log1p": (positive, torch.log1p, 4),
    "log2": (positive, torch.log2, 4, 0.1),
    "logb": (wide, lambda x: exponent(x).double(), 0),
    "nearbyint": (halves, torch.round, 0),
    "normcdf": (between(-4, 4), by_value(mpmath.ncdf), 64),
    "normcdfinv": (between(0.05, 0.95), torch.special.ndtri, 64, 0.1),
    "rcbrt": (positive, lambda x: x ** (-1 / 3), 8),
    "rint": (halves, torch.round, 0),
    "round": (halves, away, 0),
    "rsqrt": (positive, torch.rsqrt, 4),
    "sin": (wide, torch.sin, 4, 1e-3),
    "sinh": (wide, torch.sinh, 8),
    "sinpi": (between(-2, 2), lambda x: (x * math.pi).sin(), 8, 1.0),
    "sqrt": (special, torch.sqrt, 1),
    "tan": (between(-1.5, 1.5), torch.tan, 8),
    "tanh": (wide, torch.tanh, 4),
    "tgamma": (between(0.5, 20), lambda x: torch.lgamma(x).exp(), 128),
    "trunc": (special, torch.trunc, 0),
    "y0": (between(0.5, 20), by_value(lambda x: mpmath.bessely(0, x)), 16, 1.0),
    "y1": (between(0.5, 20), by_value(lambda x: mpmath.bessely(1, x)), 16, 1.0),
    "atan2": ((wide, wide), torch.atan2, 4),
    "copysign": ((special, wide), torch.copysign, 0),
    "fdim": ((wide, wide), lambda x, y: (x - y).clamp_min(0), 1),
    "fmod": ((wide, wide), torch.fmod, 0),
    "hypot": ((wide, wide), torch.hypot, 4),
    "pow": ((positive, between(-3, 3)), torch.pow, 8),
    "remainder": ((wide, wide), by_value(math.remainder), 0),
    "rhypot": ((wide, wide), lambda x, y: 1 / torch.hypot(x, y), 4),
    "fma": ((wide, wide, wide), by_value(once_rounded), 1, 0.01),
    "norm3d": ((wide,) * 3, lambda *x: torch.stack(x).norm(dim=0), 4),
    "rnorm3d": ((wide,) * 3, lambda *x: 1 / torch.stack(x).norm(dim=0), 4),
    "norm4d": ((wide,) * 4, lambda *x: torch.stack(x).norm(dim=0), 4),
    "rnorm4d": ((wide,) * 4, lambda *x: 1 / torch.stack(x).norm(dim=0), 4),
}

# only float32; the fast ones are allowed what CUDA's guide says of its intrinsics, and more
FAST: dict[str, tuple] = {
    "fast_cosf": (between(-3, 3), torch.cos, 16, 1.0),
    "fast_sinf": (between(-3, 3), torch.sin, 16, 1.0),
    "fast_tanf": (between(-1, 1), torch.tan, 64, 1.0),
    "fast_expf": (between(-9, 9), torch.exp, 64),
    "fast_exp10f": (between(-9, 9), lambda x: 10.0**x, 128),
    "fast_logf": (between(2, 90), torch.log, 16),
    "fast_log2f": (between(2, 90), torch.log2, 16),
    "fast_log10f": (between(2, 90), torch.log10, 16),
    "fast_powf": ((between(0.5, 4), between(-3, 3)), torch.pow, 64),
    "fast_dividef": ((wide, wide), torch.div, 4),
    "saturatef": (special, lambda x: torch.nan_to_num(x.clamp(0, 1), nan=0.0), 0),
    "rsqrt_rn": (positive, torch.rsqrt, 1),
}

# predicates and integers of floats
COUNTS: dict[str, tuple] = {
    "ilogb": (wide, exponent),
    "llrint": (halves, torch.round),
    "llround": (halves, away),
    "isnan": (special, torch.isnan),
    "isinf": (special, torch.isinf),
    "signbit": (special, torch.signbit),
}


def real_cases() -> Iterator[Case]:
    """Functions of floats."""
    for name, (inputs, function, ulp, *least) in (FLOATS | FAST).items():
        makers = inputs if isinstance(inputs, tuple) else (inputs,)
        for dtype in (F32,) if name in FAST else (F32, F64):
            x = tuple(make().to(dtype) for make in makers)
            # the reference is a float64 itself, and no better than the function in float64
            limit = ulp if dtype == F32 or ulp == 0 else 4 * ulp + 16
            yield Case(name, x, dtype, function(*(v.double() for v in x)), False, limit, *least)
    for name, (make, function) in COUNTS.items():
        for dtype in (F32, F64):
            x = make().to(dtype)
            result = I64 if name.startswith("ll") else I32
            yield Case(name, (x,), result, function(x.double()).to(result))
    for dtype, name in ((F32, "finitef"), (F64, "isfinited")):
        x = special().to(dtype)
        yield Case(name, (x,), I32, x.isfinite().int())
    for dtype in (F32, F64):
        x, n = wide().to(dtype), torch.randint(-9, 9, (N,), dtype=I32)
        for name in ("ldexp", "scalbn"):
            yield Case(name, (x, n), dtype, torch.ldexp(x.double(), n))
        yield Case("pow", (x, n), dtype, x.double() ** n, ulp=16 if dtype == F32 else 64)
        y = wide().to(dtype)
        yield Case("nextafter", (x, y), dtype, torch.nextafter(x, y).double())
        x, two = between(1, 20)().to(dtype), torch.full((N,), 2, dtype=I32)
        for name, function in (("jn", mpmath.besselj), ("yn", mpmath.bessely)):
            right = by_value(function)(two, x)
            yield Case(name, (two, x), dtype, right, ulp=64, least=1.0)


def to_float(value: Fraction, dtype: torch.dtype, direction: str) -> float:
    """Round a fraction in one of the four directions."""

    def next_to(x: float, towards: float) -> float:
        pair = torch.tensor([x, towards], dtype=dtype)
        return torch.nextafter(pair[:1], pair[1:]).item()

    nearest = torch.tensor(float(value), dtype=F64).to(dtype).item()
    if direction == "rn":
        return nearest
    down = direction == "rd" or (direction == "rz" and value > 0)
    if down and Fraction(nearest) > value:
        return next_to(nearest, -INF)
    if not down and Fraction(nearest) < value:
        return next_to(nearest, INF)
    return nearest


def root(value: Fraction, dtype: torch.dtype, direction: str) -> float:
    """Round the root of a fraction, which is none, in one of the four directions."""
    scale = 2**120
    floor = math.isqrt(value.numerator * scale**2 // value.denominator)
    exact = floor**2 * value.denominator == value.numerator * scale**2
    return to_float(Fraction(2 * floor + (not exact), 2 * scale), dtype, direction)


OPERATIONS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / b),
    "rcp": (1, lambda a: 1 / a),
    "fma": (3, lambda a, b, c: a * b + c),
}


def directed_cases() -> Iterator[Case]:
    """Operations that name a direction of rounding."""
    for dtype in (F32, F64):
        x = tuple(wide().to(dtype) for _ in range(3))
        fractions = [[Fraction(v) for v in part.tolist()] for part in x]
        for direction in DIRECTIONS:
            for name, (count, operation) in OPERATIONS.items():
                exact = [operation(*values) for values in zip(*fractions[:count])]
                rounded = torch.tensor([to_float(e, dtype, direction) for e in exact], dtype=F64)
                yield Case(f"{name}_{direction}", x[:count], dtype, rounded)
            roots = [root(abs(v), dtype, direction) for v in fractions[0]]
            yield Case(f"sqrt_{direction}", (x[0].abs(),), dtype, torch.tensor(roots, dtype=F64))


ROUND = {"rn": torch.round, "rz": torch.trunc, "rd": torch.floor, "ru": torch.ceil}
INTEGERS = {"int": I32, "uint": I32, "ll": I64, "ull": I64}
REALS = {"float": F32, "double": F64}


def conversion_cases() -> Iterator[Case]:
    """Conversions that name a direction of rounding."""
    for direction in DIRECTIONS:
        x = wide()
        exact = [to_float(Fraction(v), F32, direction) for v in x.tolist()]
        yield Case(f"double2float_{direction}", (x,), F32, torch.tensor(exact, dtype=F64))
        for real, dtype in REALS.items():
            for integer, kind in INTEGERS.items():
                x = (wide() * 100).to(dtype)
                x = x.abs() if integer.startswith("u") else x
                rounded = ROUND[direction](x.double()).to(kind)
                yield Case(f"{real}2{integer}_{direction}", (x,), kind, rounded)
                if dtype == F64 and kind == I32 and direction != "rn":
                    continue  # every integer of 32 bits is a double
                bits = 31 if kind == I32 else 63
                n = torch.randint(-(2**bits), 2**bits - 1, (N,)).to(kind)
                unsigned = integer.startswith("u")
                values = [v % 2 ** (bits + 1) if unsigned else v for v in n.tolist()]
                exact = [to_float(Fraction(v), dtype, direction) for v in values]
                name = f"{integer}2{real}_{direction}"
                yield Case(name, (n,), dtype, torch.tensor(exact, dtype=F64), unsigned)


def signed(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def permuted(a: int, b: int, selector: int) -> int:
    """Take four of the eight bytes of a and b, as CUDA's __byte_perm."""
    data = (a % 2**32 | (b % 2**32) << 32).to_bytes(8, "little")
    picked = bytes(data[selector >> 4 * k & 7] for k in range(4))
    return signed(int.from_bytes(picked, "little"), 32)


def integer_cases() -> Iterator[Case]:
    """Functions of integers, and of bits."""
    for dtype, bits in ((I32, 32), (I64, 64)):
        shift = torch.randint(0, bits, (N,)).to(dtype)
        x = torch.randint(-(2**63), 2**63 - 1, (N,)).to(dtype) >> shift
        y = torch.randint(-(2**63), 2**63 - 1, (N,)).to(dtype)
        x[:3] = torch.tensor([0, -1, 1])
        a, b = x.tolist(), y.tolist()
        u, v = [k % 2**bits for k in a], [k % 2**bits for k in b]

        def ints(values: Iterator[int], dtype: torch.dtype = dtype, bits: int = bits) -> Tensor:
            return torch.tensor([signed(k, bits) for k in values], dtype=dtype)

        def few(values: Iterator[int]) -> Tensor:
            return torch.tensor(list(values), dtype=I32)

        yield Case("clz", (x,), I32, few(bits - k.bit_length() for k in u))
        yield Case("popc", (x,), I32, few(k.bit_count() for k in u))
        yield Case("ffs", (x,), I32, few((k & -k).bit_length() for k in u))
        yield Case("brev", (x,), dtype, ints(int(f"{k:0{bits}b}"[::-1], 2) for k in u))
        yield Case("abs", (x,), dtype, ints(abs(k) for k in a))
        yield Case("mulhi", (x, y), dtype, ints(k * m >> bits for k, m in zip(a, b)))
        yield Case("mulhi", (x, y), dtype, ints(k * m >> bits for k, m in zip(u, v)), True)
        if dtype == I64:
            continue
        low = [signed(k, 24) for k in a], [signed(k, 24) for k in b]
        yield Case("mul24", (x, y), I32, ints(k * m for k, m in zip(*low)))
        unsigned = [k % 2**24 for k in a], [k % 2**24 for k in b]
        yield Case("mul24", (x, y), I32, ints(k * m for k, m in zip(*unsigned)), True)
        for name, carry in (("hadd", 0), ("rhadd", 1)):
            yield Case(name, (x, y), I32, ints((k + m + carry) >> 1 for k, m in zip(a, b)))
            yield Case(name, (x, y), I32, ints((k + m + carry) >> 1 for k, m in zip(u, v)), True)
        z = torch.randint(0, 2**31 - 1, (N,), dtype=I32)
        sums = ints(abs(k - m) + n for k, m, n in zip(u, v, z.tolist()))
        yield Case("sad", (x, y, z), I32, sums, True)
        codes = torch.randint(0, 0x7777, (N,), dtype=I32) & 0x7777
        picked = few(permuted(k, m, n) for k, m, n in zip(a, b, codes.tolist()))
        yield Case("byte_perm", (x, y, codes), I32, picked)
    f, d = special().float(), special()
    yield Case("float_as_int", (f,), I32, f.view(I32))
    yield Case("float_as_uint", (f,), I32, f.view(I32))
    yield Case("int_as_float", (f.view(I32),), F32, f.double())
    yield Case("uint_as_float", (f.view(I32),), F32, f.double(), True)
    yield Case("double_as_longlong", (d,), I64, d.view(I64))
    yield Case("longlong_as_double", (d.view(I64),), F64, d)
    low, high = d.view(I32)[::2].contiguous(), d.view(I32)[1::2].contiguous()
    yield Case("double2loint", (d,), I32, low)
    yield Case("double2hiint", (d,), I32, high)
    yield Case("hiloint2double", (high, low), F64, d)
    x = positive() + 0.1
    yield Case("rcp64h", (x,), F64, 1 / x, ulp=2.0**34)  # an estimate: 20 bits or so


KINDS = (real_cases, directed_cases, conversion_cases, integer_cases)
