"""ternary_linear and bit_linear, forward and backward, on every backend that can run here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bitnet_triton import use_backend
from bitnet_triton.kernels import (
    TernaryWeight,
    bit_linear,
    quantize_activations,
    quantize_weight,
    ternary_linear,
)
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference
from bitnet_triton.kernels.ternary_linear.reference import ternary_linear_reference
from bitnet_triton.testing import assert_close, randn, random_codes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = ["ternary", "binary"]
# M, N, K: one row, odd sizes, one byte row, more than one tile in each dimension
SHAPES = [(1, 4, 64), (1, 72, 33), (3, 20, 7), (70, 136, 131)]


def quantised_rows(*shape, device):
    """Activations that the quantiser maps to themselves, in every dtype: small integers * 2^-5."""
    codes = torch.randint(-126, 127, shape, device=device).double()
    codes[..., torch.randint(shape[-1], ()).item()] = 127
    return codes / 32


def masters(N, K, levels, device):
    """Master weights away from every threshold of their quantiser."""
    signs = random_codes(N, K, device=device).double()
    if levels == "binary":
        signs = signs.abs() * 2 - 1
    noise = torch.rand(N, K, dtype=torch.float64, device=device) - 0.5
    return 0.05 * (signs + 0.3 * noise)


def run(op, inputs, dy, dtype, backend=None):
    """Return the output of ``op`` and the gradient of each input, in ``dtype``."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    if backend is None:
        y = op(*leaves)
        y.backward(dy.to(dtype))
    else:
        with use_backend(backend):
            y = op(*leaves)
            y.backward(dy.to(dtype))
    names = ["dx", "dweight", "dbias"]
    grads = {f"{name}": t.grad for name, t in zip(names, leaves) if t is not None}
    return {"y": y.detach(), **grads}


def assert_all_close(ours, eager, exact):
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert_close(name, ours[name], value, eager=eager[name])


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_matches_the_reference(shape, with_bias, dtype, device, backend):
    M, N, K = shape
    x = quantised_rows(M, K, device=device)
    bias = randn(N, dtype=dtype, device=device).double() if with_bias else None
    dy = randn(M, N, dtype=dtype, device=device).double()
    weight = TernaryWeight.from_codes(random_codes(N, K, device=device), 0.0371)
    codes, scale = weight.codes(), weight.scale.double()

    def packed(x, _weight, bias=None):
        return ternary_linear(x, weight, bias)

    def reference(x, _weight, bias=None):
        return ternary_linear_reference(x, codes.to(x), scale.to(x), bias)

    inputs = (x, None, bias)
    assert_all_close(
        run(packed, inputs, dy, dtype, backend),
        run(reference, inputs, dy, dtype),
        run(reference, inputs, dy, torch.float64),
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 5, 9)], ids=str)
def test_trained_matches_the_reference(shape, levels, dtype, device, backend):
    M, N, K = shape
    x, weight = quantised_rows(M, K, device=device), masters(N, K, levels, device).to(dtype)
    bias = randn(N, dtype=dtype, device=device).double() if M % 2 else None
    dy = randn(M, N, dtype=dtype, device=device).double()

    def op(x, weight, bias=None):
        return bit_linear(x, weight, bias, levels=levels)

    def reference(x, weight, bias=None):
        return bit_linear_reference(x, weight, bias, levels=levels)

    inputs = (x, weight, bias)
    assert_all_close(
        run(op, inputs, dy, dtype, backend),
        run(reference, inputs, dy, dtype),
        run(reference, inputs, dy, torch.float64),
    )


def test_one_input_feature(device):
    """No backend is forced: torch._int_mm cannot do this one."""
    x, weight = quantised_rows(5, 1, device=device), masters(3, 1, "ternary", device)
    dy = randn(5, 3, device=device).double()
    inputs = (x, weight.float(), randn(3, device=device).double())
    exact = run(bit_linear_reference, inputs, dy, torch.float64)
    eager = run(bit_linear_reference, inputs, dy, torch.float32)
    assert_all_close(run(bit_linear, inputs, dy, torch.float32), eager, exact)

    packed = TernaryWeight.from_codes(random_codes(8, 1, device=device), 1.0)
    y = ternary_linear(x.float(), packed)
    assert torch.equal(y.double(), x @ packed.codes().t().double())


@pytest.mark.parametrize("M", [1, 33])
def test_the_integer_product_is_exact(M, device, backend):
    """The largest sums that K allows, against int64."""
    K = 4096 + 1
    x = torch.full((M, K), 127.0, device=device)  # scale 1
    codes = torch.ones(8, K, dtype=torch.int8, device=device)
    codes[1] = -1
    codes[2:6] = random_codes(4, K, device=device)
    x[-1, ::3] = -126.0
    exact = x.long() @ codes.t().long()
    with use_backend(backend):
        y = ternary_linear(x, TernaryWeight.from_codes(codes, 1.0))
    assert torch.equal(y.long(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_activations_and_weights_multiply_as_their_codes(dtype, device, backend):
    x, weight = randn(9, 200, dtype=dtype, device=device), randn(12, 200, device=device) * 0.02
    with use_backend(backend):
        a, a_scale = quantize_activations(x)
        codes, scale = quantize_weight(weight)
        exact = (a.double() @ codes.double().t()) * a_scale.double() * scale.double()
        packed = ternary_linear(x, TernaryWeight.from_codes(codes, scale))
        assert_close("packed", packed, exact)
        assert_close("trained", bit_linear(x, weight), exact)
        assert torch.equal(packed, bit_linear(x, weight))


def test_gradients_are_the_hand_written_formula(device, backend):
    """dx = dy (beta w), dweight = dy^T (a gamma / 127), dbias = sum dy, for any input."""
    x, weight = randn(6, 40, device=device), randn(8, 40, device=device)
    dy = randn(6, 8, device=device)
    ours = run(bit_linear, (x, weight, randn(8, device=device)), dy, torch.float32, backend)
    with use_backend(backend):
        a, a_scale = quantize_activations(x)
        codes, scale = quantize_weight(weight)

    def formula(dtype):
        dy_, x_q, w_q = dy.to(dtype), a.to(dtype) * a_scale.to(dtype), codes.to(dtype)
        return {"dx": dy_ @ (w_q * scale.to(dtype)), "dweight": dy_.t() @ x_q, "dbias": dy_.sum(0)}

    del ours["y"]
    assert_all_close(ours, formula(torch.float32), formula(torch.float64))


@pytest.mark.parametrize("levels", LEVELS)
def test_the_references_straight_through_form_passes_gradcheck(levels, monkeypatch):
    """With the identity in place of the quantisers, which finite differences cannot see through."""
    from bitnet_triton.kernels.bit_linear import reference as trained
    from bitnet_triton.kernels.ternary_linear import reference as packed

    one = torch.ones((), dtype=torch.float64)
    for module in (trained, packed):
        monkeypatch.setattr(module, "quantize_activations_reference", lambda x: (x, one))
    monkeypatch.setattr(trained, "quantize_weight_reference", lambda w, *, levels: (w, one))
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 5), (4, 5), 4]
    )

    assert torch.autograd.gradcheck(
        lambda *inputs: bit_linear_reference(*inputs, levels=levels), (x, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, bias: ternary_linear_reference(x, weight.detach(), one, bias), (x, bias)
    )


@pytest.mark.parametrize("op", ["packed", "trained"])
@pytest.mark.parametrize("size", [400.0, 1e-4], ids=["large", "small"])
def test_float16_gradients_survive_where_a_product_would_not(size, op, device, backend):
    """Sums of large dy pass 65504 before scaling; small dy times the scale is below 6e-8."""
    N, K = 512, 16
    x = (quantised_rows(20, K, device=device) / 128).half().requires_grad_()
    weight = torch.full((N, K), 1e-3, device=device).requires_grad_()
    packed = TernaryWeight.from_codes(torch.ones(N, K, dtype=torch.int8, device=device), 1e-3)
    dy = torch.full((20, N), size, dtype=torch.float16, device=device)
    with use_backend(backend):
        y = ternary_linear(x, packed) if op == "packed" else bit_linear(x, weight)
        y.backward(dy)
    exact_dx = dy.double() @ weight.detach().double()
    eager_dx = (dy.float() @ weight.detach().float()).half()
    assert_close("dx", x.grad, exact_dx, eager=eager_dx)
    if op == "trained":
        exact_dweight = dy.double().t() @ x.detach().double()
        eager_dweight = dy.float().t() @ x.detach().float()
        assert_close("dweight", weight.grad, exact_dweight, eager=eager_dweight)


def test_leading_dimensions_and_no_rows(device, backend):
    x, weight = randn(2, 3, 4, 24, device=device), randn(8, 24, device=device)
    packed = TernaryWeight.from_codes(*quantize_weight(weight))
    with use_backend(backend):
        for y, flat in [
            (bit_linear(x, weight), bit_linear(x.view(24, 24), weight)),
            (ternary_linear(x, packed), ternary_linear(x.view(24, 24), packed)),
        ]:
            assert y.shape == (2, 3, 4, 8)
            assert torch.equal(y.view(24, 8), flat)
        assert bit_linear(x[0, 0, 0], weight).shape == (8,)

        x, weight = x[:0].requires_grad_(), weight.requires_grad_()
        bias = randn(8, device=device).requires_grad_()
        for y in (bit_linear(x, weight, bias), ternary_linear(x, packed, bias)):
            assert y.shape == (0, 3, 4, 8)
            x.grad = weight.grad = bias.grad = None
            y.backward(torch.empty_like(y))
            assert x.grad.shape == x.shape
            assert bias.grad.eq(0).all()
            assert weight.grad is None or weight.grad.eq(0).all()


def test_rows_of_zeros_give_the_bias(device, backend):
    x = randn(5, 40, device=device)
    x[1:3] = 0
    weight, bias = randn(8, 40, device=device), randn(8, device=device)
    packed = TernaryWeight.from_codes(*quantize_weight(weight))
    with use_backend(backend):
        for y in (bit_linear(x, weight, bias), ternary_linear(x, packed, bias)):
            assert torch.equal(y[1], bias)
            assert torch.equal(y[2], bias)
            assert not torch.equal(y[0], bias)


def test_inputs_that_are_not_contiguous(device, backend):
    x, weight = randn(48, 10, device=device).t(), randn(48, 24, device=device).t()[::2]
    bias = randn(12, 3, device=device)[:, 1]
    dy = randn(12, 10, device=device).t()
    packed = TernaryWeight.from_codes(*quantize_weight(weight))
    strided = TernaryWeight(packed.packed.t().contiguous().t(), packed.scale)
    assert not any(t.is_contiguous() for t in (x, weight, bias, dy, strided.packed))

    def gradients(x, weight, bias, dy, packed):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = bit_linear(*leaves) + ternary_linear(leaves[0], packed, leaves[2])
        return y, *torch.autograd.grad(y, leaves, dy)

    with use_backend(backend):
        ours = gradients(x, weight, bias, dy, strided)
        same = gradients(*(t.contiguous() for t in (x, weight, bias, dy)), packed)
    for name, value, expected in zip(("y", "dx", "dweight"), ours, same):
        assert torch.equal(value, expected), name
    # a sum in another order, of ten values: the few elements say little about its worst error
    assert_close("dbias", ours[-1], 2 * dy.double().sum(0), worst=1e-5)


def test_backward_runs_twice_with_the_same_result(device, backend):
    x, weight = (randn(6, 24, device=device).requires_grad_() for _ in range(2))
    packed = TernaryWeight.from_codes(random_codes(8, 24, device=device), 0.5)
    with use_backend(backend):
        y = bit_linear(x, weight).sum() + ternary_linear(x, packed).square().sum()
        first = torch.autograd.grad(y, (x, weight), retain_graph=True)
        second = torch.autograd.grad(y, (x, weight))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_and_not_silently_wrong(device):
    x, weight = (randn(6, 24, device=device).requires_grad_() for _ in range(2))
    packed = TernaryWeight.from_codes(random_codes(8, 24, device=device), 0.5)
    for y in (bit_linear(x, weight), ternary_linear(x, packed)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            dx.sum().backward()


def test_gradients_under_activation_checkpointing(device):
    x, weight = (randn(6, 24, device=device).requires_grad_() for _ in range(2))
    packed = TernaryWeight.from_codes(random_codes(24, 6, device=device), 0.5)

    def block(x, weight):
        return ternary_linear(bit_linear(x, weight).tanh(), packed)

    plain = torch.autograd.grad(block(x, weight).sum(), (x, weight))
    for reentrant in (False, True):
        y = checkpoint(block, x, weight, use_reentrant=reentrant).sum()
        x.grad = weight.grad = None
        y.backward()
        assert torch.equal(x.grad, plain[0])
        assert torch.equal(weight.grad, plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_input_and_nothing_inside(dtype, device, backend):
    x, weight, bias = randn(6, 40, device=device), randn(8, 40, device=device), randn(8)
    packed = TernaryWeight.from_codes(*quantize_weight(weight))
    bias, x = bias.to(device), x.requires_grad_()
    dy = randn(6, 8, dtype=dtype, device=device)

    def gradients(x):
        y = bit_linear(x, weight, bias) + ternary_linear(x, packed, bias)
        return y, *torch.autograd.grad(y, leaf, dy)

    with use_backend(backend):
        leaf = x.detach().to(dtype).requires_grad_()
        expected = gradients(leaf)
        leaf = x
        with torch.autocast(device, dtype):
            y, dx = gradients(x)
    assert y.dtype == dtype
    assert dx.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1].float())
