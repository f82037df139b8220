"""The quantisers: codes are compared as integers, scales with the float64 formula."""

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import bit_linear, quantize_activations, quantize_weight
from bitnet_triton.kernels.quantize.compiled import compiled_weight_codes
from bitnet_triton.kernels.quantize.op import weight_stats
from bitnet_triton.kernels.quantize.reference import (
    quantize_activations_reference,
    quantize_weight_reference,
    weight_codes_reference,
)
from bitnet_triton.testing import assert_close, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (7, 33), (3, 2, 100), (5, 1), (2, 2560)]


def distance_to_tie(values):
    """How far values are from n + 1/2, where rounding jumps."""
    return (values - values.floor() - 0.5).abs()


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_match_the_float64_formula(shape, dtype, device, backend):
    x = randn(*shape, dtype=dtype, device=device)
    with use_backend(backend):
        codes, scale = quantize_activations(x)

    exact_codes, exact_scale = quantize_activations_reference(x.double())
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert_close("scale", scale, exact_scale)
    clear = distance_to_tie(x.double() / exact_scale) > 1e-4
    assert torch.equal(codes[clear], exact_codes[clear].to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_at_ties_round_to_even(dtype, device, backend):
    # 127 is the largest magnitude, so that the scale is 1 and codes are the rounded values
    x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5, 63.5, -127.0, 0.0, 0.25]
    with use_backend(backend):
        codes, scale = quantize_activations(torch.tensor([x], dtype=dtype, device=device))
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 62, 64, -127, 0, 0]
    assert scale.item() == 1.0


def test_a_row_of_zeros_gives_zeros_and_the_smallest_scale(device, backend):
    x = randn(3, 64, device=device)
    x[1] = 0
    with use_backend(backend):
        codes, scale = quantize_activations(x)
    assert codes[1].eq(0).all()
    assert scale[1].item() == torch.tensor(1e-5).div(127).item()
    assert codes[0].abs().max() == codes[2].abs().max() == 127


def test_an_outlier_takes_the_whole_range_of_its_row_only(device, backend):
    x = randn(2, 64, device=device).clamp(-3, 3)
    x[0, 5] = -3000.0
    with use_backend(backend):
        codes, _ = quantize_activations(x)
    assert codes[0, 5] == -127
    assert codes[0].ne(0).sum() == 1
    assert codes[1].ne(0).sum() > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(value, device, backend):
    x = randn(3, 64, device=device)
    x[1, 7] = value
    with use_backend(backend):
        _, scale = quantize_activations(x)
        y = bit_linear(x, randn(4, 64, device=device))
    assert torch.isfinite(scale[:, 0]).tolist() == [True, False, True]
    assert torch.isfinite(y).all(-1).tolist() == [True, False, True]
    assert not torch.isfinite(y[1]).any()


def test_activations_that_are_not_contiguous_are_quantised_alike(device, backend):
    x = randn(64, 6, device=device)
    with use_backend(backend):
        for view in (x.t(), randn(6, 128, device=device)[:, ::2], x.t()[1::2]):
            codes, scale = quantize_activations(view)
            expected_codes, expected_scale = quantize_activations(view.clone().contiguous())
            assert torch.equal(codes, expected_codes)
            assert torch.equal(scale, expected_scale)


def test_no_rows_give_no_codes(device, backend):
    with use_backend(backend):
        codes, scale = quantize_activations(torch.empty(0, 3, 8, device=device))
    assert codes.shape == (0, 3, 8)
    assert scale.shape == (0, 3, 1)


def test_activations_do_not_require_gradients(device):
    codes, scale = quantize_activations(randn(2, 8, device=device).requires_grad_())
    assert not codes.requires_grad
    assert not scale.requires_grad


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (64, 48)], ids=str)
def test_weights_match_the_float64_formula(shape, dtype, device, backend):
    weight = (randn(*shape, device=device) * 0.03).to(dtype)
    with use_backend(backend):
        codes, scale = quantize_weight(weight)
    exact_codes, exact_scale = quantize_weight_reference(weight.double(), levels="ternary")
    assert codes.dtype == torch.int8
    assert scale.shape == (1,)
    assert_close("scale", scale, exact_scale.reshape(1))
    clear = distance_to_tie(weight.double() / exact_scale) > 1e-4
    assert torch.equal(codes[clear], exact_codes[clear].to(torch.int8))


def test_weights_at_ties_round_to_even(device, backend):
    # mean magnitude 1: ties at 0.5 and 1.5
    weight = [0.5, -0.5, 1.5, -1.5, 1.0, -1.0, 0.0, 2.0]
    with use_backend(backend):
        codes, scale = quantize_weight(torch.tensor([weight], device=device))
    assert scale.item() == 1.0
    assert codes[0].tolist() == [0, 0, 1, -1, 1, -1, 0, 1]


def test_zero_weights_give_zeros_and_the_smallest_scale(device, backend):
    with use_backend(backend):
        codes, scale = quantize_weight(torch.zeros(4, 8, device=device))
    assert codes.eq(0).all()
    assert scale.item() == torch.tensor(1e-5).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", ["ternary", "binary"])
def test_codes_beside_every_threshold_are_the_rounded_quotient(levels, dtype, device):
    # the neighbours of a threshold, in the dtype of the weight, are where a formula slips
    weight = (randn(32, 32, device=device) * 0.02).to(dtype)
    stats = weight_stats(weight)
    for threshold in (stats[0] / 2, -stats[0] / 2, stats[1]):
        near = threshold.to(dtype)
        up = torch.nextafter(near, torch.tensor(torch.inf, dtype=dtype, device=device))
        down = torch.nextafter(near, torch.tensor(-torch.inf, dtype=dtype, device=device))
        weight.view(-1)[torch.randperm(1024, device=device)[:30]] = torch.stack(
            [near, up, down]
        ).repeat(10)
    expected = weight_codes_reference(weight.float(), stats, levels=levels)
    assert torch.equal(
        compiled_weight_codes(weight, stats, levels == "binary"), expected.to(torch.int8)
    )


def test_a_weight_equal_to_the_mean_is_minus_one(device):
    weight = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    codes, scale = quantize_weight_reference(weight, levels="binary")
    assert codes.tolist() == [[-1.0, -1.0, 1.0]]
    assert scale.item() == 2.0
    assert torch.equal(compiled_weight_codes(weight, weight_stats(weight), True), codes.char())


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (257, 1023)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_statistics_match_float64(shape, dtype, device, backend):
    weight = (randn(*shape, device=device) * 0.02 + 0.01).to(dtype)
    with use_backend(backend):
        stats = weight_stats(weight)
    scale, mean = weight.double().abs().mean(), weight.double().mean()
    assert stats.dtype == torch.float32
    # of magnitudes: the mean itself may be next to nothing
    close = 1e-6 * scale.item()
    assert stats.double().tolist() == pytest.approx([scale.item(), mean.item()], rel=0, abs=close)


def test_a_weight_of_zeros_has_the_smallest_scale_and_nan_stays_nan(device, backend):
    weight = torch.zeros(5, 9, device=device)
    with use_backend(backend):
        assert weight_stats(weight).tolist() == [pytest.approx(1e-5), 0.0]
        weight[4, 8] = torch.nan
        assert weight_stats(weight).isnan().all()


def test_the_statistics_of_a_large_weight_are_accurate(device, backend):
    # a float32 sum without pairs or lanes is off by 0.5 % here
    weight = randn(2048, 4096, device=device) + 0.1
    with use_backend(backend):
        scale, mean = weight_stats(weight).double().tolist()
    assert scale == pytest.approx(weight.double().abs().mean().item(), rel=2e-6)
    assert mean == pytest.approx(weight.double().mean().item(), rel=2e-5)


def test_packing_uses_the_codes_of_training(device, backend):
    # 127 times the identity has scale 1 and reads the weights out
    weight, x = randn(64, 96, device=device), 127 * torch.eye(96, device=device)
    with use_backend(backend):
        codes, scale = quantize_weight(weight)
        y = bit_linear(x, weight)
    assert torch.equal(y, (127 * codes * scale).t())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = randn(4, 4)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="`weight`: expected finite values, got NaN or infinity"):
        quantize_weight(weight)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"`x`: expected a torch.Tensor, got list"):
        quantize_activations([1.0])
    with pytest.raises(
        TypeError, match=r"`x`: expected dtype float32 or float16 or bfloat16, got float64"
    ):
        quantize_activations(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`x`: expected \[... K\] with K at least 1, got \[\]"):
        quantize_activations(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"K at least 1, got \[3, 0\]"):
        quantize_activations(torch.empty(3, 0))
    with pytest.raises(TypeError, match=r"`weight`: expected a torch.Tensor, got int"):
        quantize_weight(3)
    with pytest.raises(TypeError, match=r"`weight`: expected dtype .* got int8"):
        quantize_weight(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"`weight`: expected \[N K\], got \[4\]"):
        quantize_weight(torch.ones(4))
    with pytest.raises(
        ValueError, match=r"`weight`: expected \[N K\], each at least 1, got \[0, 4\]"
    ):
        quantize_weight(torch.ones(0, 4))
