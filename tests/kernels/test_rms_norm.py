"""The norms against float64 and against the same steps one by one, on every backend."""

import pytest
import torch
from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import (
    quantize_activations,
    relu2_mul_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from bitnet_triton.kernels.rms_norm.reference import (
    relu2_mul_norm_quantize_reference,
    rms_norm_quantize_reference,
    rms_norm_reference,
)
from bitnet_triton.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (2, 1), (5, 100), (3, 1025), (1, 2560)]
EPS = 1e-5
ALL_BACKENDS = pytest.mark.backends("triton", "compile", "reference")

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def inputs(shape, dtype, device, widths=1):
    x = torch.randn(*shape[:-1], widths * shape[-1], device=device).to(dtype)
    return x, (1 + 0.2 * torch.randn(shape[-1], device=device)).to(dtype)


@pytest.mark.pairwise
@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device, backend):
    x, weight = inputs(shape, dtype, device)
    exact = rms_norm_reference(x.double(), weight.double(), eps=EPS)
    eager = rms_norm_reference(x, weight, eps=EPS)
    assert_close("y", rms_norm(x, weight, eps=EPS), exact, eager=eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_where_transformers_rounds(dtype, device, backend):
    x, weight = inputs((7, 2560), dtype, device)
    norm = BitNetRMSNorm(2560, EPS).to(device)
    norm.weight.data = weight
    # the sums run in another order: a quotient beside a tie may fall to its other side
    assert (rms_norm(x, weight, eps=EPS) != norm(x)).float().mean() < 1e-3


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_codes_are_those_of_the_two_steps(shape, dtype, device, backend):
    x, weight = inputs(shape, dtype, device)
    codes, scale, sums = rms_norm_quantize(x, weight, eps=EPS)
    expected_codes, expected_scale = quantize_activations(rms_norm(x, weight, eps=EPS))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(sums, codes.sum(-1, dtype=torch.int32))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_feed_forward_codes_are_those_of_the_steps(shape, dtype, device, backend):
    gate_up, weight = inputs(shape, dtype, device, widths=2)
    gate, up = gate_up.chunk(2, dim=-1)
    codes, scale, sums = relu2_mul_norm_quantize(gate_up, weight, eps=EPS)
    normalised = rms_norm(gate.relu().square() * up, weight, eps=EPS)
    expected_codes, expected_scale = quantize_activations(normalised)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(sums, codes.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("op", "reference", "widths"),
    [
        (rms_norm_quantize, rms_norm_quantize_reference, 1),
        (relu2_mul_norm_quantize, relu2_mul_norm_quantize_reference, 2),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_match_the_float64_formula(
    op, reference, widths, shape, device, backend, assert_rounded
):
    x, weight = inputs(shape, torch.float32, device, widths)
    codes, scale, _ = op(x, weight, eps=EPS)
    _, exact_scale, _ = reference(x.double(), weight.double(), eps=EPS)
    assert_close("scale", scale, exact_scale)
    if widths == 2:
        gate, up = x.double().chunk(2, dim=-1)
        x = gate.relu().square() * up
    assert_rounded(codes, rms_norm_reference(x.double(), weight.double(), eps=EPS) / exact_scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(value, device, backend):
    x, weight = inputs((3, 128), torch.float32, device)
    x[1, 100] = value
    for row_scale in (
        rms_norm_quantize(x, weight)[1],
        # in the gate and in up: relu keeps NaN
        relu2_mul_norm_quantize(x, weight[:64])[1],
        relu2_mul_norm_quantize(x.flip(-1), weight[:64])[1],
    ):
        assert torch.isfinite(row_scale[[0, 2]]).all()
        assert not torch.isfinite(row_scale[1])


def test_a_row_of_zeros_gives_zeros(device, backend):
    x, weight = torch.zeros(2, 64, device=device), torch.ones(64, device=device)
    codes, scale, sums = rms_norm_quantize(x, weight)
    assert not codes.any()
    assert not sums.any()
    assert scale.eq(torch.tensor(1e-5, device=device) / 127).all()


def test_keeps_leading_dimensions_and_takes_strided_and_empty_input(device, backend):
    weight = torch.ones(16, device=device)
    x = torch.randn(2, 5, 64, device=device)[:, -1:, ::4]
    expected = rms_norm_quantize(x.contiguous(), weight)
    for value, wanted, shape in zip(
        rms_norm_quantize(x, weight), expected, [(2, 1, 16), (2, 1, 1), (2, 1)]
    ):
        assert value.shape == shape
        assert torch.equal(value, wanted)
    wide = torch.randn(4, 48, device=device)
    assert torch.equal(rms_norm(wide[:, 8:24], weight), rms_norm(wide[:, 8:24].clone(), weight))
    assert rms_norm(torch.randn(0, 16, device=device), weight).shape == (0, 16)
    assert relu2_mul_norm_quantize(torch.randn(0, 32, device=device), weight)[0].shape == (0, 16)


def gradients(norm, x, weight, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = norm(*leaves)
    dx, dweight = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.pairwise
@ALL_BACKENDS
# the last one has more rows than programs, and a program with fewer than the others
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 1025), (1030, 33)], ids=str)
def test_gradients_match_float64(shape, dtype, device, backend):
    x, weight = inputs(shape, dtype, device)
    dy = torch.randn(shape, device=device).to(dtype)

    def reference(x, weight):
        return rms_norm_reference(x, weight, eps=EPS)

    exact = gradients(reference, *(t.double() for t in (x, weight, dy)))
    eager = gradients(reference, x, weight, dy)
    for name, value in gradients(rms_norm, x, weight, dy).items():
        assert_close(name, value, exact[name], eager=eager[name])


def test_a_wider_weight_widens_the_result_as_in_transformers(device, backend):
    """Under autocast activations are narrow and weights are not."""
    x, weight = inputs((7, 256), torch.bfloat16, device)
    weight = weight.float() + 0.001
    norm = BitNetRMSNorm(256, EPS).to(device)
    norm.weight.data = weight
    dy = torch.randn(7, 256, device=device)
    ours = gradients(lambda x, w: rms_norm(x, w, eps=EPS), x, weight, dy)
    theirs = gradients(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), x, weight, dy
    )
    assert ours["y"].dtype == ours["dweight"].dtype == torch.float32
    assert (ours["y"] != theirs["y"]).float().mean() < 0.01
    torch.testing.assert_close(ours["dweight"], theirs["dweight"], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours["dx"], theirs["dx"], rtol=2e-2, atol=2e-2)


def test_gradients_of_strided_rows_and_of_none(device, backend):
    weight = torch.randn(16, device=device)
    x, dy = (torch.randn(4, 48, device=device)[:, 8:24] for _ in range(2))
    strided = gradients(rms_norm, x, weight, dy)
    for name, value in gradients(rms_norm, x.clone(), weight, dy.clone()).items():
        assert torch.equal(strided[name], value), name
    empty = gradients(rms_norm, x[:0], weight, dy[:0])
    assert empty["dx"].shape == (0, 16)
    assert not empty["dweight"].any()


def test_a_frozen_weight_gets_no_gradient(device):
    x, weight = inputs((3, 64), torch.float32, device)
    x.requires_grad_()
    rms_norm(x, weight).square().sum().backward()
    assert weight.grad is None
    assert x.grad.any()


def test_the_quantising_norms_are_not_differentiable(device):
    x = torch.randn(2, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    assert not rms_norm_quantize(x, weight)[1].requires_grad


def test_a_users_compiled_norm_trains_as_in_eager_mode(device):
    x, weight = inputs((6, 40), torch.float32, device)
    dy = torch.randn(6, 40, device=device)
    eager = gradients(rms_norm, x, weight, dy)
    compiled = gradients(torch.compile(rms_norm, fullgraph=True), x, weight, dy)
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


def test_is_traced_as_one_op():
    x, weight = torch.randn(2, 32), torch.randn(16)

    def both(x, weight):
        return rms_norm(x[:, :16], weight), *relu2_mul_norm_quantize(x, weight)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for value, expected in zip(compiled(x, weight), both(x, weight)):
        assert torch.equal(value, expected)


def test_a_row_that_no_program_holds_is_left_to_the_reference():
    x, weight = torch.randn(1, 16385), torch.ones(16385)
    exact = rms_norm_reference(x.double(), weight.double(), eps=EPS)
    assert_close("y", rms_norm(x, weight, eps=EPS), exact)
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="at most 16384"):
        rms_norm(x, weight)


def test_the_references_pass_gradcheck():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 5), (5,)])
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, eps=EPS), (x, weight))


def test_the_quantising_norms_take_one_dtype():
    for op in (rms_norm_quantize, relu2_mul_norm_quantize):
        with pytest.raises(TypeError, match="expected dtype float32"):
            op(torch.ones(2, 4).half(), torch.ones(4))


@pytest.mark.parametrize("op", [rms_norm, rms_norm_quantize, relu2_mul_norm_quantize])
@pytest.mark.parametrize(
    ("x", "weight", "eps", "error", "message"),
    [
        ([1.0], torch.ones(4), EPS, TypeError, "`(x|gate_up)`: expected a torch.Tensor, got list"),
        (torch.ones(2, 3), torch.ones(4), EPS, ValueError, r"expected \[... [48]\], got \[2, 3\]"),
        (torch.ones(()), torch.ones(4), EPS, ValueError, r"got \[\]"),
        (torch.ones(2, 4).int(), torch.ones(4), EPS, TypeError, "expected dtype float32"),
        (torch.ones(2, 4), torch.ones(4).int(), EPS, TypeError, "`weight`: expected dtype"),
        (torch.ones(2, 4), torch.ones(2, 4), EPS, ValueError, r"`weight`: expected \[D\]"),
        (torch.ones(2, 0), torch.ones(0), EPS, ValueError, r"`weight`: .* got \[0\]"),
        (torch.ones(2, 4), 1.0, EPS, TypeError, "`weight`: expected a torch.Tensor"),
    ],
)
def test_bad_arguments_are_named(op, x, weight, eps, error, message):
    with pytest.raises(error, match=message):
        op(x, weight, eps=eps)


@pytest.mark.parametrize("op", [rms_norm, rms_norm_quantize])
def test_another_device_and_a_bad_eps_are_named(op):
    with pytest.raises(ValueError, match="`x`: expected a tensor on meta"):
        op(torch.ones(2, 4), torch.ones(4, device="meta"))
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`eps`: expected 0 or a positive number"):
            op(torch.ones(2, 4), torch.ones(4), eps=eps)
