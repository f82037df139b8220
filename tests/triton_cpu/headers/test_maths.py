"""maths.h against NumPy and PyTorch in float64."""

import platform
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

SPECIAL = np.array(
    [0, 1, 0.5, 2, np.inf, np.nan, 1e-45, 1.17549435e-38, 3.4028235e38, 88.8, 128, 149.5, 104], "f4"
)
SPECIAL = np.concatenate([SPECIAL, -SPECIAL])


def torch_erf(x):
    return torch.erf(torch.from_numpy(x)).numpy()


FUNCTIONS = {
    "m_exp": np.exp, "m_exp2": np.exp2, "m_log": np.log, "m_log2": np.log2, "m_sin": np.sin,
    "m_cos": np.cos, "m_erf": torch_erf, "m_tanh": np.tanh, "m_rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
EXACT = {
    "m_sqrt": np.sqrt, "m_sqrt_rn": np.sqrt, "m_abs": np.abs, "m_floor": np.floor,
    "m_ceil": np.ceil, "m_rint": np.rint,
}  # fmt: skip


def same_numbers(actual, expected):
    """Compare values, kinds of NaN aside, and the signs of zeros."""
    equal = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    return equal | (np.isnan(actual) & np.isnan(expected))


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_functions_are_within_two_ulp_of_every_kind_of_input(call, name):
    every = np.arange(0, 2**32, 16411, np.uint64).astype(np.uint32).view(np.float32)
    dense = np.random.default_rng(1).normal(0, 3, 20000).astype(np.float32)
    x = np.concatenate([every, dense, SPECIAL])
    actual = call(f"{name} float", len(x), x, result=np.float32)
    exact = FUNCTIONS[name](x.astype(np.float64))
    rounded = exact.astype(np.float32)
    odd = ~np.isfinite(rounded) | (rounded == 0)
    # a result that the rounding of the last place decides may go either way
    edge = np.isfinite(exact) & odd & (exact != 0)
    assert same_numbers(actual, rounded)[odd & ~edge].all()
    ulp = np.spacing(np.clip(np.abs(rounded), 2.0**-126, 2.0**127)).astype(np.float64)
    within = np.abs(actual - exact) <= 2 * ulp
    wrong = np.flatnonzero(~within & ~odd)
    assert wrong.size == 0, f"{name}({x[wrong[0]]!r}) = {actual[wrong[0]]!r}, not {exact[wrong[0]]}"
    assert (np.abs(actual[edge & (rounded == 0)]) <= 2.0**-148).all()
    assert (actual[edge & np.isinf(rounded)] >= 3.4e38).all()


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", [*FUNCTIONS, *EXACT])
def test_float64_functions_agree_with_numpy(call, name):
    x = np.concatenate([np.random.default_rng(2).normal(0, 5, 2000), SPECIAL.astype(np.float64)])
    actual = call(f"{name} double", len(x), x, result=np.float64)
    expected = (FUNCTIONS | EXACT)[name](x)
    close = np.abs(actual - expected) <= 4 * np.spacing(np.abs(expected))
    assert (close | same_numbers(actual, expected)).all()


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", EXACT)
def test_float32_functions_that_round_once_are_exact(call, name):
    x = np.arange(0, 2**32, 65521, np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([x, SPECIAL, np.arange(-8, 8, 0.25, np.float32)])
    actual = call(f"{name} float", len(x), x, result=np.float32)
    assert same_numbers(actual, EXACT[name](x)).all()


def pairs(dtype):
    values = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 6e-8, 3], dtype)
    return (x.ravel().copy() for x in np.meshgrid(values, values))


@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize(("kind", "pick"), [("max", np.fmax), ("min", np.fmin)])
def test_maxnum_ignores_nan_and_maximum_spreads_it(call, kind, pick, dtype):
    numpy_type = np.float32 if dtype == "float" else np.float64
    a, b = pairs(numpy_type)
    ignoring = call(f"m_{kind}num {dtype}", len(a), a, b, result=numpy_type)
    np.testing.assert_array_equal(ignoring, pick(a, b))
    spreading = call(f"m_{kind}imum {dtype}", len(a), a, b, result=numpy_type)
    expected = np.where(np.isnan(a) | np.isnan(b), np.nan, pick(a, b))
    zeros = (a == 0) & (b == 0)
    both = np.signbit(a) & np.signbit(b) if kind == "max" else np.signbit(a) | np.signbit(b)
    expected = np.where(zeros, np.where(both, -0.0, 0.0), expected)
    assert same_numbers(spreading, expected).all()


def test_maximum_of_half_precision_spreads_nan_and_orders_zeros(call):
    a, b = pairs(np.float16)
    actual = call("m_maximum f16", len(a), a, b, result=np.float16)
    expected = np.maximum(a, b)
    zeros = (a == 0) & (b == 0)
    expected = np.where(zeros, np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0), expected)
    assert same_numbers(actual, expected).all()


@pytest.mark.parametrize("propagate", [0, 1])
def test_clamp_bounds_numbers_and_treats_nan_as_asked(call, propagate):
    actual = call("m_clamp", len(SPECIAL), propagate, SPECIAL, result=np.float32)
    expected = np.clip(SPECIAL, -1, 2)
    expected = expected if propagate else np.where(np.isnan(SPECIAL), np.float32(-1), expected)
    np.testing.assert_array_equal(actual, expected)


def test_fma_rounds_once(call):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 2000)).astype(np.float32)
    c = -(a * b)
    actual = call("m_fma", len(a), a, b, c, result=np.float32)
    exact = [float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
             for x, y, z in zip(a, b, c)]  # fmt: skip
    np.testing.assert_array_equal(actual, np.array(exact).astype(np.float32))
    assert np.count_nonzero(actual) > 1000


@pytest.mark.parametrize("bits", [32, 64])
def test_mulhiui_returns_the_high_half_of_the_unsigned_product(call, bits):
    rng = np.random.default_rng(4)
    values = rng.integers(0, 2**bits, (2, 500), dtype=f"u{bits // 8}")
    values[:, :4] = [[0, 2**bits - 1, 2**bits - 1, 1], [5, 2**bits - 1, 2, 2**bits - 1]]
    actual = call(f"m_mulhiui int{bits}_t", 500, *values, result=f"u{bits // 8}")
    assert actual.tolist() == [int(a) * int(b) >> bits for a, b in values.T]


@pytest.mark.parametrize(("name", "dtype"), [("int8_t", "i1"), ("int32_t", "i4")])
def test_absi_leaves_the_smallest_integer(call, name, dtype):
    info = np.iinfo(dtype)
    x = np.array([info.min, info.min + 1, -1, 0, 1, info.max], dtype)
    assert call(f"m_absi {name}", 6, x, result=dtype).tolist() == np.abs(x).tolist()


def test_headers_stay_cheap_to_parse(command, tmp_path):
    source = tmp_path / "empty.cpp"
    source.write_text('#include "tcpu.h"\n')
    text = subprocess.run(
        [*command, "-E", str(source)], capture_output=True, text=True, check=True
    ).stdout
    assert len(text.splitlines()) < 6000
    assert "immintrin.h" not in text


def test_loops_around_float_functions_vectorise(command, tmp_path):
    if "g++" not in Path(command[0]).name:
        pytest.skip("only g++ reports which loops it vectorised")
    calls = [*FUNCTIONS, *sorted(EXACT.keys() - {"m_sqrt_rn"}), "(float)f16", "(float)fp8e4nv"]
    source = tmp_path / "loops.cpp"
    lines = ['#include "tcpu.h"', "using namespace tcpu;"]
    lines += [
        f"void f{i}(const float* __restrict x, float* __restrict y) "
        f"{{ for (int i = 0; i < 4096; ++i) y[i] = {call}(x[i]); }}"
        for i, call in enumerate(calls)
    ]
    source.write_text("\n".join(lines) + "\n")
    march = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    options = ["-fopt-info-vec-optimized", "-c", str(source), "-o", str(tmp_path / "loops.o")]
    done = subprocess.run([*command, *march, *options], capture_output=True, text=True, check=True)
    vectorised = {int(n) for n in re.findall(r"loops\.cpp:(\d+):.*vectorized using", done.stderr)}
    assert [call for i, call in enumerate(calls) if i + 3 not in vectorised] == []
