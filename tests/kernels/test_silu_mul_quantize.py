"""silu_mul_quantize against float64 and against its steps one by one, on every backend."""

import pytest
import torch
import torch.nn.functional as F

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import quantize_activations, silu_mul_quantize
from bitnet_triton.kernels.quantize.op import quantize_rows_with_sums
from bitnet_triton.kernels.rms_norm.reference import silu_mul_quantize_reference
from bitnet_triton.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (2, 1), (5, 100), (3, 1025), (1, 6912)]

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def gate_and_up(shape, dtype, device):
    return torch.randn(*shape[:-1], 2 * shape[-1], device=device).mul(3).to(dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_steps(shape, dtype, device, backend, assert_rounded):
    gate_up = gate_and_up(shape, dtype, device)
    gate, up = gate_up.chunk(2, dim=-1)
    codes, scale, sums = silu_mul_quantize(gate_up)
    product = F.silu(gate) * up
    expected_codes, expected_scale = quantize_activations(product)
    # exponential functions differ in their last bit, which a rounding may make a whole step of
    step = torch.finfo(dtype).eps
    assert_close("scale", scale, expected_scale.double(), rms=step, worst=step * scale.max().item())
    assert (codes.int() - expected_codes).abs().max() <= 1
    if dtype == torch.float32:
        assert_rounded(codes, product.double() / expected_scale.double())
    else:
        # of a row whose largest value fell to its other side all codes have another scale
        differs = (codes != expected_codes)[(scale == expected_scale).squeeze(-1)]
        assert differs.sum() <= max(1, 0.01 * differs.numel())
    assert torch.equal(sums, codes.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_match_the_float64_formula(shape, device, backend, assert_rounded):
    gate_up = gate_and_up(shape, torch.float32, device)
    codes, scale, _ = silu_mul_quantize(gate_up)
    _, exact_scale, _ = silu_mul_quantize_reference(gate_up.double())
    assert_close("scale", scale, exact_scale)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_rounded(codes, F.silu(gate) * up / exact_scale)


def test_far_gates_saturate(device, backend):
    gate = torch.tensor([[-1e30, -200.0, -20.0, 0.0, 20.0, 127.0]], device=device)
    codes, scale, _ = silu_mul_quantize(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert codes.tolist() == [[0, 0, 0, 0, 20, 127]]
    assert_close("scale", scale, torch.ones(1, 1, dtype=torch.float64, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [10, 100], ids=["gate", "up"])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(value, column, device, backend):
    gate_up = gate_and_up((3, 64), torch.float32, device)
    gate_up[1, column] = value
    _, scale, _ = silu_mul_quantize(gate_up)
    assert torch.isfinite(scale[[0, 2]]).all()
    assert not torch.isfinite(scale[1])


def test_keeps_leading_dimensions_and_takes_strided_and_empty_input(device, backend):
    gate_up = torch.randn(2, 5, 64, device=device)[:, -1:, ::4]
    expected = silu_mul_quantize(gate_up.contiguous())
    for value, wanted, shape in zip(
        silu_mul_quantize(gate_up), expected, [(2, 1, 8), (2, 1, 1), (2, 1)]
    ):
        assert value.shape == shape
        assert torch.equal(value, wanted)
    wide = torch.randn(4, 48, device=device)
    for value, wanted in zip(
        silu_mul_quantize(wide[:, 8:24]), silu_mul_quantize(wide[:, 8:24] + 0)
    ):
        assert torch.equal(value, wanted)
    assert silu_mul_quantize(torch.randn(0, 32, device=device))[0].shape == (0, 16)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_plain_quantiser_brings_sums_along(rows, device, backend):
    x = torch.randn(rows, 100, device=device)
    codes, scale, sums = quantize_rows_with_sums(x)
    expected_codes, expected_scale = quantize_activations(x)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(sums, codes.sum(-1, dtype=torch.int32))


def test_is_traced_as_one_op_and_not_differentiable():
    gate_up = torch.randn(2, 32, requires_grad=True)

    def both(gate_up):
        return *silu_mul_quantize(gate_up), *quantize_rows_with_sums(gate_up.detach())

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for value, expected in zip(compiled(gate_up), both(gate_up)):
        assert torch.equal(value, expected)
        assert not value.requires_grad


def test_a_row_that_no_program_holds_is_left_to_the_reference():
    gate_up = torch.randn(1, 2 * 16385)
    exact = silu_mul_quantize_reference(gate_up.double())
    assert_close("scale", silu_mul_quantize(gate_up)[1], exact[1])
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="at most 16384"):
        silu_mul_quantize(gate_up)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        ([1.0], TypeError, "`gate_up`: expected a torch.Tensor, got list"),
        (torch.ones(2, 4).int(), TypeError, "`gate_up`: expected dtype"),
        (torch.ones(2, 3), ValueError, r"expected \[... 2\*F\] .* got \[2, 3\]"),
        (torch.ones(2, 0), ValueError, r"got \[2, 0\]"),
        (torch.ones(()), ValueError, r"got \[\]"),
    ],
)
def test_bad_arguments_are_named(gate_up, error, message):
    with pytest.raises(error, match=message):
        silu_mul_quantize(gate_up)
