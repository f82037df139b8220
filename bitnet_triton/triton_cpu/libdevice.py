"""Which C++ function stands for each symbol of CUDA's libdevice.

The functions are in ``include/libdevice.h``. A symbol that is absent has no meaning on a CPU.
"""

from collections.abc import Iterator

# One overloaded function for both: __nv_<name> takes float64, __nv_<name>f takes float32
_BY_WIDTH = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh cospi cyl_bessel_i0
    cyl_bessel_i1 erf erfc erfcinv erfcx erfinv exp exp10 exp2 expm1 fabs fdim floor fma fmod hypot
    ilogb j0 j1 jn ldexp lgamma llrint llround log log10 log1p log2 logb nearbyint nextafter norm3d
    norm4d normcdf normcdfinv pow powi rcbrt remainder rhypot rint rnorm3d rnorm4d round rsqrt
    scalbn sin sinh sinpi sqrt tan tanh tgamma trunc y0 y1 yn
"""

# Only float32
_FLOAT32 = {
    **{
        f"__nv_fast_{name}f": f"ld_fast_{name}"
        for name in ("cos", "exp10", "exp", "fdivide", "log10", "log2", "log", "pow", "sin", "tan")
    },
    "__nv_saturatef": "ld_saturate",
    "__nv_frsqrt_rn": "ld_frsqrt_rn",
}

_INTEGERS = """
    abs llabs brev brevll byte_perm clz clzll ffs ffsll hadd uhadd rhadd urhadd mul24 umul24
    mulhi umulhi mul64hi umul64hi popc popcll sad usad
"""

_BITS = """
    double2hiint double2loint hiloint2double double_as_longlong longlong_as_double float_as_int
    float_as_uint int_as_float uint_as_float rcp64h
"""

_PREDICATES = {
    "__nv_isnanf": "ld_isnan",
    "__nv_isnand": "ld_isnan",
    "__nv_isinff": "ld_isinf",
    "__nv_isinfd": "ld_isinf",
    "__nv_finitef": "ld_isfinite",
    "__nv_isfinited": "ld_isfinite",
    "__nv_signbitf": "ld_signbit",
    "__nv_signbitd": "ld_signbit",
}

_DIRECTIONS = {"rn": "nearest", "rz": "zero", "rd": "down", "ru": "up"}
_INTEGER_TYPES = {"int": "int32_t", "uint": "uint32_t", "ll": "int64_t", "ull": "uint64_t"}


def _rounded(suffix: str, direction: str) -> Iterator[tuple[str, str]]:
    """Operations and conversions that name a direction of rounding."""
    mode = f"Rounding::{direction}"
    for operation in ("add", "sub", "mul", "div", "rcp", "sqrt"):
        for width in "fd":
            yield f"__nv_{width}{operation}_{suffix}", f"ld_{operation}<{mode}>"
    for name in ("fma", "fmaf"):
        yield f"__nv_{name}_{suffix}", f"ld_fma<{mode}>"
    for name, integer in _INTEGER_TYPES.items():
        for real in ("float", "double"):
            yield f"__nv_{real}2{name}_{suffix}", f"ld_to_integer<{mode}, {integer}>"
            yield f"__nv_{name}2{real}_{suffix}", f"ld_to_float<{mode}, {real}, {integer}>"
    yield f"__nv_double2float_{suffix}", f"ld_to_float<{mode}, float, double>"


SYMBOLS: dict[str, str] = {
    **{f"__nv_{name}{width}": f"ld_{name}" for name in _BY_WIDTH.split() for width in ("", "f")},
    **{f"__nv_{name}": f"ld_{name}" for name in (_INTEGERS + _BITS).split()},
    **_FLOAT32,
    **_PREDICATES,
    **{symbol: call for item in _DIRECTIONS.items() for symbol, call in _rounded(*item)},
}
