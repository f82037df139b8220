"""int8_linear and its largest outputs against float64, on every backend."""

import pytest
import torch

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import Int8Weight, int8_linear, int8_linear_topk
from bitnet_triton.kernels.int8_linear.reference import (
    int8_linear_reference,
    split_activations_reference,
)
from bitnet_triton.runtime import backend_objection, capture
from bitnet_triton.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# M, N, K: few tokens and many, full blocks and parts of them
SHAPES = [(1, 128, 2560), (1, 1, 1), (3, 130, 100), (6, 257, 515), (33, 64, 256), (70, 65, 512)]
# k and dtype of the values
BEST = [(1, torch.float32), (5, torch.bfloat16), (5, torch.float16)]

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def inputs(shape, dtype, device, with_bias=False):
    M, N, K = shape
    x = torch.randn(M, K, device=device).to(dtype)
    weight = Int8Weight.from_dense(torch.randn(N, K, device=device))
    return x, weight, torch.randn(N, device=device).to(dtype) if with_bias else None


def exact(x, weight, bias):
    """Split in float32, as the op does, and multiply in float64."""
    high, low, step = (t.double() for t in split_activations_reference(x.float()))
    rounded = (128 * high + low) * step[:, None]
    y = rounded @ weight.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device, backend):
    x, weight, bias = inputs(shape, dtype, device, with_bias=shape[1] % 2 == 0)
    assert_close("y", int8_linear(x, weight, bias), exact(x, weight, bias))


@pytest.mark.parametrize("shape", [(1, 96, 2560), (2, 96, 2560), (5, 96, 2560)], ids=str)
def test_loses_nothing_but_what_the_weight_lost(shape, device, backend):
    x, weight, _ = inputs(shape, torch.float32, device)
    unsplit = x.double() @ weight.dequantize(torch.float64).t()
    # a step is a 16319th of the largest of K normal values, its error uniform: 7e-5 of their RMS
    assert_close("y", int8_linear(x, weight), unsplit, rms=1.2e-4, worst=1e-3 * shape[2] ** 0.5)


def test_the_integer_sums_are_exact_at_their_extremes(device, backend):
    """Sums of the widest row the weight allows come close to the end of int32."""
    K = 32768
    weight = Int8Weight(
        torch.full((3, K), 127, dtype=torch.int8, device=device), torch.ones(3, device=device)
    )
    x = torch.full((1, K), 16319.0, device=device)
    assert int8_linear(x, weight).eq(float(16319 * 127 * K)).all()
    assert int8_linear(-x, weight).eq(-float(16319 * 127 * K)).all()


def test_fifteen_bits_come_back_from_two_planes(device):
    x = torch.randint(-16319, 16320, (4, 500), device=device).double()
    x[:, 0] = 16319
    high, low, step = split_activations_reference(x)
    assert torch.equal(128 * high + low, x)
    assert torch.equal(step, torch.ones_like(step))
    assert high.abs().max() <= 127
    assert low.abs().max() <= 64


def test_rows_of_zeros_and_rows_that_are_not_finite_stay_apart(device, backend):
    x, weight, bias = inputs((4, 40, 96), torch.float32, device, with_bias=True)
    expected = int8_linear(x, weight, bias)
    x[1], x[2, 7], x[3, 5] = 0.0, float("nan"), float("inf")
    y = int8_linear(x, weight, bias)
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[1], bias)
    assert not torch.isfinite(y[2:]).any()


def test_keeps_leading_dimensions_and_takes_strided_and_empty_input(device, backend):
    weight = Int8Weight.from_dense(torch.randn(32, 16, device=device))
    x = torch.randn(2, 5, 32, device=device)[:, -1:, ::2]
    assert torch.equal(int8_linear(x, weight), int8_linear(x.contiguous(), weight))
    assert int8_linear(x, weight).shape == (2, 1, 32)
    assert int8_linear(torch.randn(16, device=device), weight).shape == (32,)
    assert int8_linear(torch.randn(0, 16, device=device), weight).shape == (0, 32)
    values, indices = int8_linear_topk(x, weight, 3)
    assert values.shape == indices.shape == (2, 1, 3)
    assert int8_linear_topk(torch.randn(0, 16, device=device), weight, 3)[1].shape == (0, 3)


def best(y, k):
    """Sort by value, then by index, in Python."""
    order = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in y.tolist()]
    indices = torch.tensor(order, device=y.device)
    return y.gather(1, indices), indices


@pytest.mark.parametrize(("k", "dtype"), BEST, ids=str)
@pytest.mark.parametrize("shape", [(1, 130, 100), (2, 640, 64), (5, 257, 100)], ids=str)
def test_the_largest_outputs_are_those_of_the_linear(shape, k, dtype, device, backend):
    x, weight, bias = inputs(shape, dtype, device, with_bias=True)
    values, indices = int8_linear_topk(x, weight, k, bias)
    expected_values, expected_indices = best(int8_linear(x, weight, bias), k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("M", [1, 4])
def test_of_equal_outputs_the_first_wins(M, device, backend):
    """Within a block of rows, across blocks, and between 0.0 and -0.0."""
    codes = torch.zeros(300, 8, dtype=torch.int8, device=device)
    codes[[7, 20, 21, 150, 299]] = 3
    scale = torch.ones(300, device=device)
    scale[1::2] = -1.0  # rows of zeros are 0.0 and -0.0 in turns
    scale[[7, 21, 299]] = 1.0
    x = torch.ones(M, 8, device=device)
    values, indices = int8_linear_topk(x, Int8Weight(codes, scale), 9)
    wanted = [7, 20, 21, 150, 299, 0, 1, 2, 3]
    assert indices.tolist() == [wanted] * M
    assert values[0].tolist() == pytest.approx([24.0] * 5 + [0.0] * 4)
    _, (first,) = int8_linear_topk(x[:1], Int8Weight(codes, scale))
    assert first.tolist() == [7]


def test_outputs_that_are_equal_once_rounded_are_equal(device, backend):
    weight = Int8Weight.from_dense(torch.eye(3, device=device))
    bias = torch.tensor([1.0, 1.001, 0.5], device=device)
    x = torch.zeros(1, 3, device=device, dtype=torch.bfloat16)
    assert int8_linear_topk(x, weight, 2, bias)[1].tolist() == [[0, 1]]
    assert int8_linear_topk(x.float(), weight, 2, bias)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_infinite_and_missing_outputs_keep_their_order(dtype, device, backend):
    weight = Int8Weight.from_dense(torch.eye(6, device=device))
    bias = torch.tensor([-3.0, -1.0, float("-inf"), float("nan"), float("inf"), -2.0])
    x = torch.zeros(1, 6, device=device, dtype=dtype)
    values, indices = int8_linear_topk(x, weight, 6, bias.to(device, dtype))
    assert indices.tolist() == [[3, 4, 1, 5, 0, 2]]
    assert values[0, 0].isnan()
    assert torch.equal(values[0, 1:].cpu(), bias[[4, 1, 5, 0, 2]].to(dtype))
    # NaN of either sign, as x86 and others make it
    flipped = int8_linear_topk(x, weight, 2, -bias.to(device, dtype))
    assert flipped[1].tolist() == [[3, 2]]


def test_all_outputs_can_be_asked_for(device, backend):
    x, weight, _ = inputs((2, 16, 64), torch.float32, device)
    values, indices = int8_linear_topk(x, weight, 16)
    assert torch.equal(indices.sort().values, torch.arange(16, device=device).expand(2, 16))
    assert torch.equal(values, values.sort(descending=True).values)


def test_more_than_programs_keep_are_left_to_the_reference(device):
    x, weight, _ = inputs((1, 64, 32), torch.float32, device)
    expected = best(int8_linear(x, weight), 17)
    values, indices = int8_linear_topk(x, weight, 17)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(indices, expected[1])
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="best 16 at most"):
        int8_linear_topk(x, weight, 17)


def test_a_row_that_no_program_splits_is_left_to_the_reference(device):
    x, weight, _ = inputs((1, 2, 32769), torch.float32, device)
    assert_close("y", int8_linear(x, weight), exact(x, weight, None))
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="at most 32768"):
        int8_linear(x, weight)


def test_autocast_casts_the_input_and_gradients_stop(device, backend):
    x, weight, _ = inputs((2, 8, 16), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = int8_linear(x.requires_grad_(), weight)
    assert y.dtype == torch.bfloat16
    assert not y.requires_grad
    assert torch.equal(y, int8_linear(x.bfloat16(), weight))


@pytest.mark.parametrize("tokens", [1, 3])
def test_its_launches_can_be_recorded_and_replayed(tokens):
    if (objection := backend_objection("triton", torch.device("cpu"))) is not None:
        pytest.skip(objection)
    from bitnet_triton.kernels.int8_linear.forward import (
        launch_int8_linear,
        launch_int8_linear_topk,
    )

    x, weight, bias = inputs((tokens, 260, 64), torch.bfloat16, "cpu", with_bias=True)
    with capture(torch.device("cpu")) as graph:
        y = launch_int8_linear(x, weight.codes, weight.scale, bias)
        values, indices = launch_int8_linear_topk(x, weight.codes, weight.scale, bias, 2)
    x.copy_(torch.randn(tokens, 64))
    graph.replay()
    assert torch.equal(y, int8_linear(x, weight, bias))
    for value, expected in zip((values, indices), int8_linear_topk(x, weight, 2, bias)):
        assert torch.equal(value, expected)


def test_is_traced_as_one_op():
    x, weight, bias = inputs((2, 24, 16), torch.float32, "cpu", with_bias=True)

    def both(x, codes, scale, bias):
        weight = Int8Weight(codes, scale)
        return int8_linear(x, weight, bias), *int8_linear_topk(x, weight, 2, bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    arguments = x, weight.codes, weight.scale, bias
    for value, expected in zip(compiled(*arguments), both(*arguments)):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_to_the_nearest_of_255_steps_of_their_row(dtype):
    # more rows than are quantised at a time
    dense = torch.randn(8200, 33).to(dtype)
    dense[1] = 0
    weight = Int8Weight.from_dense(dense)
    largest = dense.float().abs().amax(1)
    assert torch.equal(weight.codes.abs().amax(1), 127 * (largest > 0).to(torch.int8))
    torch.testing.assert_close(weight.scale[2:], largest[2:] / 127)
    error = (weight.dequantize(torch.float64) - dense.double()).abs()
    assert (error <= 0.5001 * weight.scale[:, None]).all()


def test_half_a_step_goes_to_the_even_code():
    dense = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert Int8Weight.from_dense(dense).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_the_reference_passes_gradcheck_in_scale_and_bias():
    x, codes = torch.randn(2, 6, dtype=torch.float64), torch.randint(-127, 128, (3, 6)).double()
    scale, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda scale, bias: int8_linear_reference(x, codes, scale, bias), (scale, bias)
    )


def test_a_weight_moves_as_a_whole():
    weight = Int8Weight.from_dense(torch.randn(4, 6)).to("meta")
    assert (weight.shape, weight.device.type, weight.scale.device.type) == ((4, 6), "meta", "meta")


CODES, SCALE = torch.ones(4, 6, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Int8Weight([1], SCALE), TypeError, "`codes`: expected a torch.Tensor"),
        (lambda: Int8Weight(CODES.int(), SCALE), TypeError, "`codes`: expected dtype int8"),
        (lambda: Int8Weight(CODES[0], SCALE), ValueError, r"`codes`: expected \[N K\]"),
        (lambda: Int8Weight(CODES[:0], SCALE[:0]), ValueError, r"`codes`: .* got \[0, 6\]"),
        (
            lambda: Int8Weight(CODES.new_empty(1, 132105), SCALE[:1]), ValueError,
            "`codes`: .* K up to 132104, got 132105",
        ),
        (lambda: Int8Weight(CODES, SCALE.half()), TypeError, "`scale`: expected dtype float32"),
        (lambda: Int8Weight(CODES, SCALE[1:]), ValueError, r"`scale`: expected \[N\] with N=4"),
        (lambda: Int8Weight(CODES, SCALE.to("meta")), ValueError, "`scale`: .* on cpu"),
        (lambda: Int8Weight.from_dense(CODES), TypeError, "`weight`: expected dtype"),
        (lambda: Int8Weight.from_dense(SCALE), ValueError, r"`weight`: expected \[N K\]"),
        (lambda: Int8Weight.from_dense(SCALE[None] / 0), ValueError, "`weight`: .* finite"),
        (lambda: Int8Weight.from_dense(SCALE[None] * torch.nan), ValueError, "`weight`: .* finite"),
    ],
)  # fmt: skip
def test_bad_weights_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    "op", [int8_linear, lambda x, w, bias=None: int8_linear_topk(x, w, 1, bias)]
)
@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        ([1.0], None, None, TypeError, "`x`: expected a torch.Tensor"),
        (torch.ones(2, 6).int(), None, None, TypeError, "`x`: expected dtype"),
        (torch.ones(2, 5), None, None, ValueError, "`x`: expected .* K=6"),
        (torch.ones(()), None, None, ValueError, "`x`: expected"),
        (torch.ones(2, 6, device="meta"), None, None, ValueError, "`x`: expected a tensor on cpu"),
        (torch.ones(2, 6), torch.ones(4, 6), None, TypeError, "`weight`: .* got Tensor; see Int8W"),
        (torch.ones(2, 6), None, torch.ones(3), ValueError, r"`bias`: expected \[N\] with N=4"),
        (torch.ones(2, 6), None, torch.ones(4).int(), TypeError, "`bias`: expected dtype"),
    ],
)
def test_bad_arguments_are_named(op, x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        op(x, Int8Weight(CODES, SCALE) if weight is None else weight, bias=bias)


@pytest.mark.parametrize("k", [0, 5, 1.0])
def test_a_bad_number_of_outputs_is_named(k):
    with pytest.raises(ValueError, match="`k`: expected an integer from 1 to N=4"):
        int8_linear_topk(torch.ones(2, 6), Int8Weight(CODES, SCALE), k)
