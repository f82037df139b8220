"""What a kernel may be given: scalars of every type, constants, tuples, nothing at all."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def integers_kernel(y_ptr, small, one, negative, large, huge, BIG: tl.constexpr):
    tl.store(y_ptr, small * 2)
    tl.store(y_ptr + 1, one + 1)
    tl.store(y_ptr + 2, negative)
    tl.store(y_ptr + 3, large + 1)
    tl.store(y_ptr + 4, huge // 3)
    tl.store(y_ptr + 5, BIG)
    tl.store(y_ptr + 6, small // 4 + negative % 3)


@pytest.mark.ops("scalar arguments")
def test_integers_of_every_size(run, check):
    y = torch.empty(7).long()
    run(integers_kernel, (1,))(y, 21, 1, -5, 2**31, 2**62 + 9, BIG=2**40)
    check(y, torch.tensor([42, 2, -5, 2**31 + 1, (2**62 + 9) // 3, 2**40, 5 - 2]))


@triton.jit
def unsigned_kernel(y_ptr, n):
    tl.store(y_ptr, n >> 1)


@pytest.mark.ops("scalar arguments")
@pytest.mark.no_interpreter("it reads the argument as signed")
def test_integers_above_63_bits_are_unsigned(run, check):
    y = torch.empty(1).long()
    run(unsigned_kernel, (1,))(y, 2**64 - 2)
    check(y, torch.tensor([2**63 - 1]))


@triton.jit
def specialised_kernel(x_ptr, y_ptr, n, m, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0) * m)


@pytest.mark.ops("scalar arguments")
@pytest.mark.parametrize("n", [0, 1, 2, 16, 17])
def test_special_integers_are_no_special_case(run, check, n):
    """Triton compiles 1 as a constant and multiples of 16 apart."""
    x, y = torch.randn(32), torch.empty(32)
    run(specialised_kernel, (1,))(x, y, n, n, BLOCK=32)
    check(y, torch.where(torch.arange(32) < n, x, 0) * n)
    shifted = torch.randn(33)[1:]  # not aligned to 16 bytes
    run(specialised_kernel, (1,))(shifted, y, n, n, BLOCK=32)
    check(y, torch.where(torch.arange(32) < n, shifted, 0) * n)


@triton.jit
def floats_kernel(y_ptr, f, neg, flag, off):
    tl.store(y_ptr, f * 2)
    tl.store(y_ptr + 1, neg)
    tl.store(y_ptr + 2, flag)
    if flag:
        tl.store(y_ptr + 3, 5.0)
    else:
        tl.store(y_ptr + 3, 6.0)
    tl.store(y_ptr + 4, tl.where(off, 7.0, 8.0))


@pytest.mark.ops("scalar arguments")
@pytest.mark.no_interpreter("a bool is 32 bits wide to it")
def test_floats_and_booleans(run, check):
    y = torch.empty(5)
    run(floats_kernel, (1,))(y, 0.1, float("-inf"), True, False)
    check(y, torch.tensor([torch.tensor(0.1).item() * 2, float("-inf"), 1.0, 5.0, 8.0]))


@triton.jit
def annotated_kernel(
    y_ptr, a: tl.float32, b: tl.float64, c: tl.float16, d: tl.bfloat16, e: tl.int8, f: tl.int64,
    g: tl.uint32, h: tl.int1,
):  # fmt: skip
    tl.store(y_ptr, a)
    tl.store(y_ptr + 1, b)
    tl.store(y_ptr + 2, c)
    tl.store(y_ptr + 3, d)
    tl.store(y_ptr + 4, e)
    tl.store(y_ptr + 5, f)
    tl.store(y_ptr + 6, g)
    tl.store(y_ptr + 7, h)


@pytest.mark.ops("scalar arguments")
@pytest.mark.no_interpreter("it does not read annotations")
def test_scalars_of_annotated_types(run, check):
    y = torch.empty(8).double()
    run(annotated_kernel, (1,))(y, 0.1, 0.1, 0.1, 0.1, -3, 2**40, 2**32 - 1, True)
    tenths = [torch.tensor(0.1, dtype=torch.float64).to(d) for d in (torch.float32, torch.float64)]
    tenths += [torch.tensor(0.1).half(), torch.tensor(0.1).bfloat16()]
    rest = torch.tensor([-3, 2**40, 2**32 - 1, 1]).double()
    check(y, torch.cat([torch.stack([t.double() for t in tenths]), rest]))


@triton.jit
def constants_kernel(
    y_ptr, N: tl.constexpr, F: tl.constexpr, FLAG: tl.constexpr, NAME: tl.constexpr,
    DTYPE: tl.constexpr, NOTHING: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    tl.store(y_ptr, N * 2 + 1)
    tl.store(y_ptr + 1, F)
    if FLAG:
        tl.store(y_ptr + 2, 1.0)
    if NAME == "relu":
        tl.store(y_ptr + 3, 2.0)
    tl.store(y_ptr + 4, tl.full((), 2.7, tl.float32).to(DTYPE))
    if NOTHING is None:
        tl.store(y_ptr + 5, tl.sum(tl.full(SHAPE, 1.0, tl.float32)))


@pytest.mark.ops("constant arguments")
@pytest.mark.no_interpreter("its scalars have no empty shape")
def test_constants_of_every_type(run, check):
    y = torch.zeros(6)
    run(constants_kernel, (1,))(
        y, N=4, F=0.5, FLAG=True, NAME="relu", DTYPE=tl.int32, NOTHING=None, SHAPE=(4, 8)
    )
    check(y, torch.tensor([9, 0.5, 1, 2, 2, 32]))


@triton.jit
def optional_kernel(x_ptr, bias_ptr, y_ptr, BLOCK: tl.constexpr, SCALE: tl.constexpr = 3):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i)
    tl.store(y_ptr + i, x * SCALE)


@pytest.mark.ops("None as an argument")
@pytest.mark.parametrize("with_bias", [True, False])
def test_none_stands_for_no_tensor(run, check, with_bias):
    x, bias, y = torch.randn(16), torch.randn(16), torch.empty(16)
    run(optional_kernel, (1,))(x, bias if with_bias else None, y, BLOCK=16)
    check(y, (x + bias if with_bias else x) * 3)


@triton.jit
def tuples_kernel(pointers, sizes, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a_ptr, b_ptr = pointers
    total = tl.load(a_ptr + i) * sizes[0] + tl.load(b_ptr + i) * sizes[1]
    for k in tl.static_range(len(pointers)):
        total += tl.load(pointers[k] + i)
    tl.store(y_ptr + i, total)


@pytest.mark.ops("tuples")
def test_tuples_of_tensors_and_numbers(run, check):
    a, b = torch.randint(-9, 9, (16,)).float(), torch.randint(-9, 9, (16,)).float()
    y = torch.empty(16)
    run(tuples_kernel, (1,))((a, b), (2, 5), y, BLOCK=16)
    check(y, 3 * a + 6 * b)


class Matrix(NamedTuple):
    data: torch.Tensor
    rows: int
    strides: tuple


@triton.jit
def named_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for row in range(x.rows):
        here = tl.load(x.data + row * x.strides[0] + i * x.strides[1], mask=i < n, other=0.0)
        tl.store(y.data + row * y.strides[0] + i * y.strides[1], here * y.rows, mask=i < n)


@pytest.mark.ops("named tuples")
def test_named_tuples_with_tuples_in_them(run, check):
    x, y = torch.randn(5, 12), torch.zeros(12, 5)
    arguments = Matrix(x, 5, (12, 1)), Matrix(y, 7, (1, 5))
    run(named_kernel, (1,))(*arguments, 12, BLOCK=16)
    check(y, 7 * x.T)


@triton.jit
def swap_pair(pair):
    return pair[1], pair[0]


@triton.jit
def tuples_inside_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    both = (tl.load(x_ptr + i), i.to(tl.float32))
    for _ in range(n):
        both = swap_pair(both)
        both = (both[0] + 1, both[1] * 2)
    if n > 2:
        both = (both[1], both[0])
    tl.store(y_ptr + i, both[0])
    tl.store(y_ptr + BLOCK + i, both[1])


@pytest.mark.ops("tuples")
def test_loops_and_branches_carry_tuples(run, check):
    x, y = torch.randint(-9, 9, (16,)).float(), torch.empty(2, 16)
    run(tuples_inside_kernel, (1,))(x, y, 3, BLOCK=16)
    a, b = x, torch.arange(16).float()
    for _ in range(3):
        a, b = b + 1, a * 2
    check(y, torch.stack([b, a]))


FACTOR: tl.constexpr = tl.constexpr(7)


@triton.jit
def globals_kernel(y_ptr, x: tl.constexpr):
    tl.store(y_ptr, FACTOR * x)


@pytest.mark.ops("constant arguments")
def test_global_constants_are_read(run, check):
    y = torch.empty(1).int()
    run(globals_kernel, (1,))(y, 6)
    check(y, torch.tensor([42]))


@triton.jit
def doubled(x):
    return x * 2


@triton.jit
def applied_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, FUNCTION(tl.load(x_ptr + i)))


@pytest.mark.ops("constant arguments")
def test_functions_are_constants(run, check):
    x, y = torch.randn(16), torch.empty(16)
    run(applied_kernel, (1,))(x, y, FUNCTION=doubled, BLOCK=16)
    check(y, 2 * x)


@triton.heuristics({"BLOCK": lambda meta: triton.next_power_of_2(meta["n"])})
@triton.jit
def heuristic_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x + BLOCK, mask=i < n)


@pytest.mark.ops("triton.heuristics")
def test_heuristics_choose_constants(run, check):
    x, y = torch.randint(0, 9, (50,)).float(), torch.empty(50)
    run(heuristic_kernel, (1,))(x, y, 50)
    check(y, x + 64)


@triton.autotune(
    [triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64}, num_warps=8, num_stages=2)],
    key=["n"],
    reset_to_zero=["count_ptr"],
)
@triton.jit
def tuned_kernel(x_ptr, y_ptr, count_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)
    tl.atomic_add(count_ptr, tl.sum((i < n).to(tl.int32)))


@pytest.mark.ops("triton.autotune")
@pytest.mark.no_interpreter("it times nothing")
def test_a_tuned_kernel_runs_its_best_configuration(run, check):
    x, y, count = torch.randn(100), torch.empty(100), torch.zeros(1).int()
    run(tuned_kernel, lambda meta: (triton.cdiv(100, meta["BLOCK"]),))(x, y, count, 100)
    check(y, 2 * x)
    check(count, torch.tensor([100]))


@pytest.mark.ops("kernel[grid] after install()", "triton.autotune")
@pytest.mark.no_interpreter("it has no other driver")
def test_kernels_run_in_the_usual_way_when_installed(check):
    import bitnet_triton.triton_cpu as triton_cpu

    x, y, z, count = torch.randn(100), torch.empty(128), torch.empty(100), torch.zeros(1).int()
    triton_cpu.install()
    try:
        specialised_kernel[(1,)](x, y, 100, 3, BLOCK=128, num_warps=8)
        tuned_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, z, count, 100)
    finally:
        triton_cpu.uninstall()
    check(y, torch.cat([3 * x, torch.zeros(28)]))
    check(z, 2 * x)
    check(count, torch.tensor([100]))


@triton.jit
def method_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)


@pytest.mark.ops("num_warps, num_stages")
@pytest.mark.parametrize("options", [{"num_warps": 1}, {"num_warps": 16, "num_stages": 5}], ids=str)
def test_options_of_a_gpu_are_accepted(run, check, options):
    x, y = torch.randn(16), torch.empty(16)
    run(method_kernel, (1,))(x, y, BLOCK=16, **options)
    check(y, x + 1)


@tl.core._aggregate
class Interval:
    low: tl.tensor
    high: tl.tensor

    @triton.constexpr_function
    def __init__(self, low, high):
        self.low = low
        self.high = high

    @triton.jit
    def length(self):
        return self.high - self.low

    @triton.jit
    def moved(self, by):
        return Interval(self.low + by, self.high + by * 2)


@triton.jit
def aggregate_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    interval = Interval(x, x + 1)
    for k in range(n):
        interval = interval.moved(k)
    tl.store(y_ptr + i, interval.length())


@pytest.mark.ops("aggregates")
@pytest.mark.no_interpreter("it has no aggregates")
def test_loops_carry_aggregates(run, check):
    x, y = torch.randint(-9, 9, (16,)).float(), torch.empty(16)
    run(aggregate_kernel, (1,))(x, y, 4, BLOCK=16)
    check(y, torch.full((16,), 7.0))
