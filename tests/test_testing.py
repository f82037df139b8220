"""assert_close catches what it promises to catch."""

import pytest
import torch

from bitnet_triton.testing import RMS_LIMITS, assert_close, randn, random_codes

DTYPES = list(RMS_LIMITS)


@pytest.fixture(params=DTYPES, ids=str)
def pair(request):
    """A result that is right, rounded once to its dtype, and the exact one."""
    exact = torch.randn(512, 1024, dtype=torch.float64)
    return exact.to(request.param), exact


def test_a_result_rounded_once_passes(pair):
    assert_close("y", *pair)


def test_one_element_off_by_a_standard_deviation_is_found_and_named(pair):
    actual, exact = pair
    actual[17, 1001] += 1
    with pytest.raises(AssertionError, match=r"^y: element \[17, 1001\] .* 1 of 524288 elements"):
        assert_close("y", actual, exact)


def test_a_small_systematic_error_is_found(pair):
    actual, exact = pair
    wrong = (exact * (1 + 4 * RMS_LIMITS[actual.dtype])).to(actual.dtype)
    # a coarse reference hides it from the worst element, not from the whole tensor
    eager = actual.clone()
    eager[0, 0] += 1
    with pytest.raises(AssertionError, match="y: relative RMS error"):
        assert_close("y", wrong, exact, eager=eager)


def test_the_worst_element_is_measured_against_the_reference(pair):
    actual, exact = pair
    eager = actual.clone()
    eager[3, 4] += 0.5
    actual[1, 2] += 1.4
    assert_close("y", actual, exact, eager=eager, rms=1)
    actual[1, 2] += 0.2
    with pytest.raises(AssertionError, match=r"element \[1, 2\]"):
        assert_close("y", actual, exact, eager=eager, rms=1)


def test_tolerances_at_the_call_replace_the_default_ones(pair):
    actual, exact = pair
    actual[1, 2] += 0.25
    assert_close("y", actual, exact, rms=0.1, worst=0.5)
    with pytest.raises(AssertionError, match=r"element \[1, 2\]"):
        assert_close("y", actual, exact, rms=0.1, worst=0.1)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close("y", actual, exact, rms=1e-9, worst=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_named(pair, value):
    actual, exact = pair
    actual[2, 3] = value
    with pytest.raises(AssertionError, match=rf"^dx: result\[2, 3\] is {value}$"):
        assert_close("dx", actual, exact, worst=float("inf"), rms=float("inf"))


def test_a_reference_that_is_not_finite_is_refused(pair):
    actual, exact = pair
    exact[2, 3] = float("nan")
    with pytest.raises(AssertionError, match=r"exact\[2, 3\] is nan"):
        assert_close("y", actual, exact)


def test_a_wrong_shape_is_refused_even_where_it_broadcasts(pair):
    actual, exact = pair
    with pytest.raises(
        AssertionError, match=r"expected the result to be \[512, 1024\], got \[1, 1024\]"
    ):
        assert_close("y", actual[:1], exact)
    with pytest.raises(AssertionError, match="reference to be"):
        assert_close("y", actual, exact, eager=actual[:1])


def test_wrong_dtypes_are_refused(pair):
    actual, exact = pair
    with pytest.raises(AssertionError, match="float64 reference"):
        assert_close("y", actual, exact.float())
    with pytest.raises(AssertionError, match="expected a float32, float16 or bfloat16 result"):
        assert_close("y", exact, exact)
    with pytest.raises(AssertionError, match="reference in"):
        assert_close("y", actual, exact, eager=exact)


def test_empty_and_zero_tensors_pass_and_zero_is_exact():
    empty = torch.empty(0, 4)
    assert_close("y", empty, empty.double())
    zeros = torch.zeros(3, 4)
    assert_close("y", zeros, zeros.double())
    with pytest.raises(AssertionError, match=r"element \[0, 0\]"):
        assert_close("y", zeros + 1e-30, zeros.double())


def test_scalars_have_an_empty_index():
    with pytest.raises(AssertionError, match=r"element \[\]"):
        assert_close("loss", torch.tensor(1.5), torch.tensor(1.0, dtype=torch.float64))


def test_random_inputs_repeat_with_the_seed_and_have_the_dtype_asked_for():
    torch.manual_seed(1)
    first = randn(3, 5, dtype=torch.bfloat16), random_codes(40, 10)
    torch.manual_seed(1)
    second = randn(3, 5, dtype=torch.bfloat16), random_codes(40, 10)
    assert first[0].dtype == torch.bfloat16
    assert first[1].dtype == torch.int8
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[1].unique().tolist() == [-1, 0, 1]
