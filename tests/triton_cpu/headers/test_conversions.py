"""types.h against the definition of each narrow float, PyTorch, and exact integers."""

import numpy as np
import pytest
import torch

SPECIAL = np.array([0, 1, np.inf, np.nan, 1e-45, 1.17549435e-38, 3.4028235e38], np.float32)


@np.errstate(invalid="ignore")
def same_numbers(actual, expected):
    """Compare values, kinds of NaN aside, and the signs of zeros."""
    equal = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    return equal | (np.isnan(actual) & np.isnan(expected))


class Format:
    """A narrow float by its definition; codes of magnitudes run from 0 to ``largest``."""

    def __init__(self, exponent, mantissa, *, bias, largest, infinity=None, nan=None, fnuz=False):
        self.bits, self.infinity, self.nan, self.fnuz = 1 + exponent + mantissa, infinity, nan, fnuz
        code = np.arange(largest + 1)
        power, fraction = code >> mantissa, (code & (2**mantissa - 1)) / 2.0**mantissa
        self.values = np.where(
            power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - bias)
        )

    @property
    def dtype(self):
        return np.uint16 if self.bits == 16 else np.uint8

    def decode(self, codes):
        magnitude = codes.astype(int) & (2 ** (self.bits - 1) - 1)
        values = np.where(
            magnitude < len(self.values), self.values[magnitude % len(self.values)], np.nan
        )
        if self.infinity is not None:
            values = np.where(magnitude == self.infinity, np.inf, values)
        values = np.where(codes >> (self.bits - 1), -values, values)
        return np.where(codes == 0x80, np.nan, values) if self.fnuz else values

    def nearest(self, x):
        """Round to the nearest value, ties to the even code, beyond the last one as defined."""
        a, v = np.abs(x), self.values
        low = np.clip(np.searchsorted(v, a, side="right") - 1, 0, len(v) - 2)
        middle = (v[low] + v[low + 1]) / 2
        code = low + ((a > middle) | ((a == middle) & (low % 2 == 1)))
        if self.infinity is not None:
            step = v[-1] - v[-2]
            code = np.where(a >= v[-1] + step / 2, self.infinity, code)
        code = np.where(np.isnan(x), -1, code)
        return code, np.signbit(x) & ~(self.fnuz & (code == 0))


FORMATS = {
    "f16": Format(5, 10, bias=15, largest=0x7BFF, infinity=0x7C00),
    "bf16": Format(8, 7, bias=127, largest=0x7F7F, infinity=0x7F80),
    "fp8e4nv": Format(4, 3, bias=7, largest=0x7E),
    "fp8e5": Format(5, 2, bias=15, largest=0x7B),
    "fp8e4b15": Format(4, 3, bias=15, largest=0x7F),
    "fp8e4b8": Format(4, 3, bias=8, largest=0x7F, fnuz=True),
    "fp8e5b16": Format(5, 2, bias=16, largest=0x7F, fnuz=True),
}
TORCH_TYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2, "fp8e4b8": torch.float8_e4m3fnuz, "fp8e5b16": torch.float8_e5m2fnuz,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_narrow_float_has_the_right_value(call, name):
    form = FORMATS[name]
    codes = np.arange(2**form.bits).astype(form.dtype)
    actual = call(f"{name} float", len(codes), codes, result=np.float32)
    expected = form.decode(codes)
    if name == "fp8e5":
        expected = np.where((codes & 0x7F) == 0x7C, np.where(codes >> 7, -np.inf, np.inf), expected)
    assert same_numbers(actual, expected).all()
    if name in TORCH_TYPES:
        judged = torch.from_numpy(codes).view(TORCH_TYPES[name]).float().numpy()
        assert same_numbers(actual, judged).all()
    whole = call(f"{name} int32_t", len(codes), codes, result=np.int32)
    clipped = np.clip(np.nan_to_num(expected, nan=0.0), -(2.0**31), 2.0**31 - 1)
    np.testing.assert_array_equal(whole, np.trunc(clipped).astype(np.int64))


def around(values, dtype):
    """Return each value, its neighbours, and all of that negated."""
    values = np.concatenate([values, SPECIAL.astype(np.float64)]).astype(dtype)
    with np.errstate(all="ignore"):
        near = [values, np.nextafter(values, dtype(0)), np.nextafter(values, dtype(np.inf))]
    return np.concatenate([*near, *(-x for x in near)])


@pytest.mark.parametrize("source", ["float", "double"])
@pytest.mark.parametrize("name", FORMATS)
def test_conversion_to_a_narrow_float_rounds_once_to_nearest_even(call, name, source):
    form, dtype = FORMATS[name], np.float32 if source == "float" else np.float64
    middles = (form.values[1:] + form.values[:-1]) / 2
    top = form.values[-1] * np.array([1 + 2.0**-12, 1.01, 1.1, 2, 4])
    with np.errstate(over="ignore"):
        x = around(np.concatenate([form.values, middles, top]), dtype)
    actual = call(f"{source} {name}", len(x), x, result=form.dtype)
    code, negative = form.nearest(x.astype(np.float64))
    numbers = code >= 0
    expected = code | (negative.astype(int) << (form.bits - 1))
    np.testing.assert_array_equal(actual[numbers], expected[numbers])
    missing = np.full(1, 0x7F) if name == "fp8e4b15" else None
    if missing is None:
        assert np.isnan(form.decode(actual[~numbers])).all()
    else:
        assert (actual[~numbers] & 0x7F == missing).all()


@pytest.mark.parametrize("name", FORMATS)
def test_integers_become_the_nearest_narrow_float(call, name):
    x = np.concatenate([np.arange(-700, 700), [-(2**31), 2**31 - 1, 65519, 65520]]).astype(np.int32)
    actual = call(f"int32_t {name}", len(x), x, result=FORMATS[name].dtype)
    code, negative = FORMATS[name].nearest(x.astype(np.float32).astype(np.float64))
    shift = FORMATS[name].bits - 1
    np.testing.assert_array_equal(actual, code | (negative.astype(int) << shift))


@pytest.mark.parametrize("source", ["float", "double"])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("sign", ["", "u"])
def test_conversion_to_integers_saturates_and_maps_nan_to_zero(call, source, width, sign):
    dtype = np.float32 if source == "float" else np.float64
    powers = 2.0 ** np.arange(0, 66)
    x = around(np.concatenate([powers, powers - 1, powers + 0.5, [1e30]]), dtype)
    info = np.iinfo(f"{sign}int{width}")
    actual = call(f"{source} {sign}int{width}_t", len(x), x, result=info.dtype)

    def whole(value):
        if np.isnan(value):
            return 0
        if np.isinf(value):
            return info.max if value > 0 else info.min
        return min(max(int(value), info.min), info.max)

    assert actual.tolist() == [whole(float(v)) for v in x]
