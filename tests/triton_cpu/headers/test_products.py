"""vector.h, dot.h, pack.h, row_dots.h and few_rows.h against NumPy, on every instruction set."""

import numpy as np
import pytest
import torch


def bytes_of(count, seed=5):
    return np.random.default_rng(seed).integers(0, 256, count * 64).astype(np.uint8)


def test_byte_vectors_flip_shift_and_combine(call_product):
    every = np.arange(256).astype(np.uint8)
    flipped = call_product("flip64", 4, every, result=np.uint8)
    np.testing.assert_array_equal(flipped, every ^ 0x80)
    for n in range(8):
        shifted = call_product("shr64", 4, n, every, result=np.uint8)
        np.testing.assert_array_equal(shifted, every >> n)
    for c in (0, 3, 0x80, 0xFF):
        assert (call_product("splat64", 4, c, every, result=np.uint8) == c).all()
        combined = call_product("operators", 4, c, every, result=np.uint8)
        c = np.uint8(c)
        with np.errstate(over="ignore"):
            expected = ((every + c) ^ c) - ((~every | c) & c)
        np.testing.assert_array_equal(combined, expected)


@pytest.mark.parametrize(("name", "most"), [("dot4", 255), ("dot4_u7", 127)])
def test_dot4_is_exact_at_the_extremes(call_product, name, most):
    rng = np.random.default_rng(6)
    u = np.concatenate([[most] * 128, rng.integers(0, most + 1, 640)]).astype(np.uint8)
    s = np.concatenate([[-128] * 64, [127] * 64, rng.integers(-128, 128, 640)]).astype(np.int8)
    acc = rng.integers(-(2**30), 2**30, 192).astype(np.int32)
    actual = call_product(name, 12, u, s, acc, result=np.int32)
    expected = acc + (u.astype(np.int32) * s).reshape(-1, 4).sum(1)
    np.testing.assert_array_equal(actual, expected)


def test_hsum16_adds_the_lanes_of_each_vector(call_product):
    x = np.random.default_rng(7).integers(-1000, 1000, (16, 16))
    actual = call_product("hsum16", x.astype(np.int32), result=np.int32)
    np.testing.assert_array_equal(actual, x.sum(1))
    actual = call_product("hsum16f", x.astype(np.float32), result=np.float32)
    np.testing.assert_array_equal(actual, x.sum(1))


NUMPY_TYPES = {
    "float": np.float32, "double": np.float64, "f16": np.float16, "int8_t": np.int8,
    "int16_t": np.int16, "uint8_t": np.uint8, "int32_t": np.int32, "int64_t": np.int64,
}  # fmt: skip
SOME_SHAPES = [(2, 5, 7), (7, 80, 33), (13, 64, 64)]
MORE_SHAPES = [(1, 1, 1), (1, 16, 3), (6, 23, 130), (17, 100, 67)]
STRIDES = {
    "rows": lambda n, k: (n + 3, 1),
    "columns": lambda n, k: (1, k + 5),
    "any": lambda n, k: (2, 2 * k + 1),
    "backwards": lambda n, k: (-(n + 2), -1),
}


def stored(x, name):
    """Return numbers that the type holds exactly, as it stores them."""
    if name == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if name == "fp8e5":
        return torch.from_numpy(x).to(torch.float8_e5m2).view(torch.uint8).numpy()
    return x.astype(NUMPY_TYPES[name])


class Product:
    """Operands of one product, with the rows of A and the elements of B apart in memory."""

    def __init__(self, shape, strides, a, b, c):
        self.a, self.b, self.c = a, b, c  # [M, K] [K, N] [M, N], float64
        _, n, k = shape
        self.lda = k + 3
        self.strides = STRIDES[strides](n, k)
        span = sum((size - 1) * abs(step) for size, step in zip((k, n), self.strides)) + 1
        self.memory = np.zeros(span)
        self.first = 0 if self.strides[0] > 0 else span - 1
        rows, columns = np.arange(k)[:, None], np.arange(n)
        self.memory[self.first + rows * self.strides[0] + columns * self.strides[1]] = b

    def run(self, call, name, kinds):
        """Return C + A B by the program."""
        padded = np.zeros((len(self.a), self.lda))
        padded[:, : self.a.shape[1]] = self.a
        flat = padded.ravel()[: padded.size - self.lda + self.a.shape[1]]
        result = call(
            name, self.lda, *self.strides, self.first, len(self.memory), stored(flat, kinds[0]),
            stored(self.memory, kinds[0]), stored(self.c, kinds[1]), result=NUMPY_TYPES[kinds[1]],
        )  # fmt: skip
        return result.reshape(self.c.shape)


def check_products(call, kinds, shape, sign, draw):
    m, n, k = shape
    name = f"{kinds[0]} {kinds[1]} {m} {n} {k} {sign}"
    for strides in STRIDES:
        c = np.random.default_rng(8).integers(-50, 50, (m, n)).astype(float)
        product = Product(shape, strides, *draw(m, n, k), c)
        actual = product.run(call, name, kinds)
        expected = (c + product.a @ product.b).astype(actual.dtype)
        np.testing.assert_array_equal(actual, expected, f"{name}, B by {strides}")


def check_products_in_fours(call, shape, sign, draw):
    """B lies in fours: unpacked in the product, packed first, and with C not read."""
    m, n, k = shape
    a, b = draw(m, n, k)
    c = np.random.default_rng(9).integers(-50, 50, (m, n))
    fours = b.reshape(k // 4, 4, n).swapaxes(1, 2)
    for way in (0, 1, 2):
        actual = call(
            f"quads {m} {n} {k} {sign}", k + 3, way, stored(apart(a, k + 3), "int8_t"),
            stored(fours.ravel(), "int8_t"), stored(c, "int32_t"), result=np.int32,
        )  # fmt: skip
        expected = a @ b if way == 2 else c + a @ b
        np.testing.assert_array_equal(actual.reshape(m, n), expected, f"{sign}, {way=}")


def quarters(m, n, k):
    rng = np.random.default_rng([m, n, k])
    return rng.integers(-16, 17, (m, k)) / 4, rng.integers(-16, 17, (k, n)) / 4


@pytest.mark.parametrize("kind", ["float", "bf16"])
def test_products_of_floats_are_exact_where_they_can_be(call_product, kind):
    for shape in SOME_SHAPES:
        check_products(call_product, (kind, "float"), shape, "both", quarters)


def test_products_of_half_precision_accumulate_in_float32(call_product):
    check_products(call_product, ("f16", "float"), (7, 80, 33), "both", quarters)


@pytest.mark.parametrize("sign", ["both", "a_u7", "b_u7"])
def test_products_of_bytes_are_exact_at_the_extremes(call_product, sign):
    least = {"both": (-128, -128), "a_u7": (0, -128), "b_u7": (-128, 0)}[sign]

    def anything(m, n, k):
        rng = np.random.default_rng([m, n, k])
        return rng.integers(least[0], 128, (m, k)), rng.integers(least[1], 128, (k, n))

    def smallest(m, n, k):
        return np.full((m, k), least[0]), np.full((k, n), least[1])

    def largest_and_smallest(m, n, k):
        return np.full((m, k), 127), np.full((k, n), least[1])

    def alternating(m, n, k):
        rng = np.random.default_rng([m, n, k])
        return rng.choice([least[0], 127], (m, k)), rng.choice([least[1], 127], (k, n))

    draws = (anything, smallest, largest_and_smallest, alternating)
    for shape in SOME_SHAPES:
        for draw in draws:
            check_products(call_product, ("int8_t", "int32_t"), shape, sign, draw)
    for shape in ((1, 16, 4), (8, 80, 20)):
        for draw in draws:
            check_products_in_fours(call_product, shape, sign, draw)


@pytest.mark.parametrize("kinds", [("float", "float"), ("int8_t", "int32_t")], ids="-".join)
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_products_of_odd_shapes(call_rare, kinds, shape):
    def draw(m, n, k):
        return tuple(x * 4 for x in quarters(m, n, k))

    check_products(call_rare, kinds, shape, "both", draw)


RARE = {
    ("double", "double"): (7, 20, 33), ("int16_t", "int32_t"): (2, 5, 7),
    ("uint8_t", "int32_t"): (7, 20, 33), ("int8_t", "int64_t"): (2, 5, 7),
    ("f16", "f16"): (2, 5, 7), ("fp8e5", "float"): (7, 20, 33), ("float", "double"): (2, 5, 7),
}  # fmt: skip


@pytest.mark.parametrize("kinds", RARE, ids="-".join)
def test_products_of_rare_types(call_rare, kinds):
    def draw(m, n, k):
        low = 0 if kinds[0].startswith("u") else -2
        rng = np.random.default_rng([m, n, k])
        return rng.integers(low, 3, (m, k)), rng.integers(low, 3, (k, n))

    check_products(call_rare, kinds, RARE[kinds], "both", draw)


@pytest.mark.parametrize("kind", ["float", "bf16"])
def test_nan_and_inf_stay_in_their_row_and_column(call_product, kind):
    shape = m, n, k = 7, 80, 33
    a, b = quarters(m, n, k)
    a[3, k - 1] = np.nan
    b[0, n - 1] = np.inf
    for strides in STRIDES:
        product = Product(shape, strides, a, b, np.zeros((m, n)))
        actual = product.run(call_product, f"{kind} float 7 80 33 both", (kind, "float"))
        touched = np.zeros((m, n), bool)
        touched[3], touched[:, n - 1] = True, True
        assert np.isnan(actual[3]).all()
        assert not np.isfinite(actual[:, n - 1]).any()
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(actual[~touched], (a @ b)[~touched])


@pytest.mark.parametrize("kinds", [("float", "float"), ("bf16", "float"), ("f16", "float"),
                                   ("int8_t", "int32_t")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize(("n", "k"), [(1, 1), (23, 205)])
def test_lane_products_fold_to_dot_products(call_product, kinds, n, k):
    scale = 4 if kinds[0] == "int8_t" else 1
    a, b = (x * scale for x in quarters(1, n, k))
    draws = [(a[0], b.T)]
    if kinds[0] == "int8_t":
        draws += [(np.full(k, -128), np.full((n, k), least)) for least in (-128, 127)]
    for vector, rows in draws:
        lanes, c = np.arange(n * 16) % 7, np.arange(n)
        apart = np.zeros((n, k + 5))
        apart[:, :k] = rows
        actual = call_product(
            f"lanes {kinds[0]} {kinds[1]} {n} {k}", k + 5, stored(vector, kinds[0]),
            stored(apart.ravel()[: (n - 1) * (k + 5) + k], kinds[0]), stored(lanes, kinds[1]),
            stored(c, kinds[1]), result=NUMPY_TYPES[kinds[1]],
        )  # fmt: skip
        np.testing.assert_array_equal(actual, c + lanes.reshape(n, 16).sum(1) + rows @ vector)


def apart(x, step):
    """Return the rows of a matrix one after the other, their beginnings ``step`` elements apart."""
    padded = np.zeros((len(x), step))
    padded[:, : x.shape[1]] = x
    return padded.ravel()[: padded.size - step + x.shape[1]]


@pytest.mark.parametrize("kind", ["float", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 16, 8), (2, 64, 128), (4, 16, 32)], ids=str)
def test_products_of_few_rows_read_the_matrix_where_it_lies(call_product, kind, shape):
    m, n, k = shape
    a, b = quarters(m, n, k)
    c = np.arange(m * n).reshape(m, n)
    for name, left, right in (("rows", kind, b.T), ("few", "float", b)):
        lda, ldb = k + 3, right.shape[1] + 5
        actual = call_product(
            f"{name} {kind} {m} {n} {k}", lda, ldb, stored(apart(a, lda), left),
            stored(apart(right, ldb), kind), stored(c, "float"), result=np.float32,
        )  # fmt: skip
        np.testing.assert_array_equal(actual.reshape(m, n), c + a @ b, name)
