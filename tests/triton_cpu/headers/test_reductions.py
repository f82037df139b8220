"""reduce.h and atomics.h against NumPy."""

import numpy as np
import pytest

NUMPY_TYPES = {
    "float": np.float32, "double": np.float64, "f16": np.float16, "int8_t": np.int8,
    "int16_t": np.int16, "int32_t": np.int32, "int64_t": np.int64,
}  # fmt: skip


def to_bf16(x):
    """Return the codes of numbers that bfloat16 holds exactly."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(codes):
    return (codes.astype(np.uint32) << 16).view(np.float32)


REDUCTIONS = {
    "h_add": np.add.reduce, "h_mul": np.multiply.reduce, "h_maxnum": np.fmax.reduce,
    "h_minnum": np.fmin.reduce, "h_maximum": np.maximum.reduce, "h_minimum": np.minimum.reduce,
    "h_max": np.maximum.reduce, "h_min": np.minimum.reduce, "h_and": np.bitwise_and.reduce,
    "h_or": np.bitwise_or.reduce, "h_xor": np.bitwise_xor.reduce,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["h_add", "h_mul"] + [f"h_{m}{k}" for m in ("max", "min") for k in ("num", "imum")]
)
def test_reductions_of_floats(call, name):
    rng = np.random.default_rng(9)
    for lanes, kind in ((1, "float"), (4, "double"), (16, "float"), (64, "float")):
        choice = [-2, -1, 1, 2] if name == "h_mul" else np.arange(-9, 10)
        x = rng.choice(choice, (200, lanes)).astype(NUMPY_TYPES[kind])
        x[rng.random(x.shape) < 0.01] = np.nan
        actual = call(f"{name} {lanes} {kind}", 200, x, result=x.dtype)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(actual, REDUCTIONS[name](x, 1), f"{lanes} {kind}")


def test_reductions_of_narrow_floats(call):
    x = np.random.default_rng(10).normal(size=(100, 8)).astype(np.float16)
    x[7, 3] = np.nan
    actual = call("h_maximum 8 f16", 100, x, result=np.float16)
    np.testing.assert_array_equal(actual, x.max(1))
    y = np.random.default_rng(11).integers(-50, 50, (100, 16)).astype(float)
    actual = call("h_minnum 16 bf16", 100, to_bf16(y), result=np.uint16)
    np.testing.assert_array_equal(from_bf16(actual), y.min(1))


@pytest.mark.parametrize("name", ["add", "mul", "max", "min", "umax", "umin", "and", "or", "xor"])
def test_reductions_of_integers(call, name):
    for lanes, kind in ((2, "int32_t"), (16, "int32_t"), (64, "int8_t"), (8, "int64_t")):
        dtype = np.dtype(NUMPY_TYPES[kind])
        info = np.iinfo(dtype)
        x = np.random.default_rng(12).integers(info.min, info.max, (200, lanes), dtype, True)
        actual = call(f"h_{name} {lanes} {kind}", 200, x, result=dtype)
        judged = x.view(f"u{dtype.itemsize}") if name[0] == "u" else x
        reduce = REDUCTIONS["h_" + name.removeprefix("u")]
        with np.errstate(over="ignore"):
            wanted = reduce(judged, 1, dtype=judged.dtype).view(dtype)
        np.testing.assert_array_equal(actual, wanted, f"{lanes} {kind}")


UPDATES = {
    "add": np.add, "fadd": np.add, "max": np.fmax, "min": np.fmin, "umax": np.maximum,
    "umin": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "xchg": lambda cell, x: x,
}  # fmt: skip


def check_updates(call, name, kind, x):
    """Each call returns what the one before it left."""
    cell, history = x[0], []
    with np.errstate(all="ignore"):
        for operand in x:
            history.append(cell)
            if name[0] == "u" and name[1] == "m":
                unsigned = np.array([cell, operand]).view(f"u{x.dtype.itemsize}")
                cell = np.array(UPDATES[name](*unsigned)).view(x.dtype)[()]
            else:
                cell = UPDATES[name](cell, operand)
    actual = call(f"a_{name} {kind}", len(x), x, result=x.dtype)
    np.testing.assert_array_equal(actual, np.array([*history, cell], x.dtype))


@pytest.mark.parametrize("kind", ["int8_t", "int16_t", "int32_t", "int64_t"])
@pytest.mark.parametrize("name", ["add", "max", "min", "umax", "umin", "and", "or", "xor", "xchg"])
def test_atomics_of_integers_return_the_old_value(call, name, kind):
    info = np.iinfo(kind[:-2])
    x = np.random.default_rng(13).integers(info.min, info.max, 60, info.dtype, True)
    check_updates(call, name, kind, x)


@pytest.mark.parametrize("kind", ["float", "double", "f16"])
@pytest.mark.parametrize("name", ["add", "fadd", "max", "min", "xchg"])
def test_atomics_of_floats_return_the_old_value(call, name, kind):
    x = np.random.default_rng(14).integers(-9, 9, 60).astype(NUMPY_TYPES[kind])
    if name in ("max", "min"):
        x[[5, 40]] = np.nan
    check_updates(call, name, kind, x)


def test_compare_and_swap_replaces_only_what_it_expects(call):
    x = np.array([4, 5, 6, 9, 7, 7, 8], np.int64)  # replaces where the cell holds x - 1
    expected = [4, 4, 5, 6, 6, 7, 7, 8]
    for kind in ("int8_t", "int32_t", "int64_t", "float"):
        actual = call(f"a_cas {kind}", 7, x.astype(NUMPY_TYPES[kind]), result=NUMPY_TYPES[kind])
        assert actual.tolist() == expected, kind
    actual = call("a_cas bf16", 7, to_bf16(x), result=np.uint16)
    assert from_bf16(actual).tolist() == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a_add", f"int{bits}_t") for bits in (8, 16, 32, 64)]
    + [("a_fadd", kind) for kind in ("float", "double", "f16", "bf16")],
)
def test_no_addition_is_lost_among_threads(call, name, kind):
    left, impossible = call(f"parallel {name} {kind}", 300_000, result=np.float32)
    assert left == 0
    assert impossible == 0
