"""The public linears around their mathematics: arguments, frozen inputs, torch.compile, memory."""

# ruff: noqa: E501 - a table of calls and messages

from __future__ import annotations

import importlib

import pytest
import torch

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import TernaryWeight, bit_linear, quantize_weight, ternary_linear
from bitnet_triton.kernels.bit_linear import op as bit_module
from bitnet_triton.kernels.ternary_linear import op as ternary_module
from bitnet_triton.testing import randn, random_codes

PACKED = TernaryWeight.from_codes(torch.ones(8, 6, dtype=torch.int8), 1.0)
X, W = torch.ones(2, 6), torch.ones(8, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ternary_linear(X, W), TypeError, "`weight`: expected a TernaryWeight, got Tensor; see TernaryWeight.from_codes"),
        (lambda: ternary_linear(None, PACKED), TypeError, "`x`: expected a torch.Tensor, got NoneType"),
        (lambda: ternary_linear(X.double(), PACKED), TypeError, "`x`: expected dtype float32 or float16 or bfloat16, got float64"),
        (lambda: ternary_linear(X[:, :5], PACKED), ValueError, r"`x`: expected \[... K\] with K=6, got \[2, 5\]"),
        (lambda: ternary_linear(X[0, 0], PACKED), ValueError, r"`x`: expected \[... K\] with K=6, got \[\]"),
        (lambda: ternary_linear(X.to("meta"), PACKED), ValueError, "`x`: expected a tensor on cpu, got one on meta"),
        (lambda: ternary_linear(X, PACKED, torch.ones(7)), ValueError, r"`bias`: expected \[N\] with N=8, got \[7\]"),
        (lambda: ternary_linear(X, PACKED, torch.ones(8, dtype=torch.int32)), TypeError, "`bias`: expected dtype .* got int32"),
        (lambda: ternary_linear(X, PACKED, 1.0), TypeError, "`bias`: expected a torch.Tensor, got float"),
        (lambda: ternary_linear(X, PACKED, torch.ones(8, device="meta")), ValueError, "`bias`: expected a tensor on cpu"),
        (lambda: bit_linear(X, PACKED), TypeError, "`weight`: expected a torch.Tensor, got TernaryWeight"),
        (lambda: bit_linear(X, W.int()), TypeError, "`weight`: expected dtype .* got int32"),
        (lambda: bit_linear(X, W[0]), ValueError, r"`weight`: expected \[N K\], got \[6\]"),
        (lambda: bit_linear(X, W[:0]), ValueError, r"`weight`: expected \[N K\], each at least 1, got \[0, 6\]"),
        (lambda: bit_linear(X.double(), W), TypeError, "`x`: expected dtype .* got float64"),
        (lambda: bit_linear(X[:, 1:], W), ValueError, r"`x`: expected \[... K\] with K=6, got \[2, 5\]"),
        (lambda: bit_linear(X, W.to("meta")), ValueError, "`x`: expected a tensor on meta, got one on cpu"),
        (lambda: bit_linear(X, W, torch.ones(2, 4)), ValueError, r"`bias`: expected \[N\] with N=8, got \[2, 4\]"),
        (lambda: bit_linear(X, W, levels="quaternary"), ValueError, "`levels`: expected one of ternary, binary, got 'quaternary'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: bit_linear(X, W), lambda: ternary_linear(X, PACKED)])
def test_a_forced_backend_that_cannot_run_is_an_error_with_the_reason(call, monkeypatch):
    reason = "no C[+][+] compiler"
    chooser = importlib.import_module("bitnet_triton.runtime.select")
    monkeypatch.setattr(chooser, "_device_objection", lambda *_: "no C++ compiler")
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailableError, match=f"backend `triton` was asked for.*{reason}"),
    ):
        call()


def test_a_shape_that_a_forced_backend_cannot_do_is_an_error_with_the_reason():
    with (
        use_backend("compile"),
        pytest.raises(BackendUnavailableError, match=r"torch\._int_mm is wrong for K = 1"),
    ):
        bit_linear(X[:, :1], W[:, :1])


def spy(monkeypatch, module, name, calls):
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or original(*args))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight bias"])
def test_only_the_gradients_that_are_asked_for_are_computed(wanted, monkeypatch):
    calls = []
    for name in ("_bit_linear_bwd_dx", "_bit_linear_bwd_dweight", "bias_gradient"):
        spy(monkeypatch, bit_module, name, calls)
    tensors = {"x": randn(3, 6), "weight": randn(8, 6), "bias": randn(8)}
    for name in wanted.split():
        tensors[name].requires_grad_()
    bit_linear(**tensors).sum().backward()
    names = {
        "_bit_linear_bwd_dx": "x",
        "_bit_linear_bwd_dweight": "weight",
        "bias_gradient": "bias",
    }
    assert [names[c] for c in calls] == wanted.split()
    assert [n for n, t in tensors.items() if t.grad is not None] == wanted.split()


def test_a_packed_weight_needs_no_gradient_of_a_frozen_input(monkeypatch):
    calls = []
    spy(monkeypatch, ternary_module, "_ternary_linear_bwd", calls)
    bias = randn(8).requires_grad_()
    ternary_linear(randn(3, 6), PACKED, bias).sum().backward()
    assert calls == []
    assert bias.grad.tolist() == [3.0] * 8


def test_no_gradient_is_recorded_where_nothing_requires_one():
    assert not bit_linear(X, W).requires_grad
    assert not ternary_linear(X, PACKED).requires_grad
    with torch.no_grad():
        assert not bit_linear(X, W.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(bit_linear(X.clone(), W), bit_linear(X, W))


def test_the_backward_takes_the_backend_that_was_forced_in_the_forward(monkeypatch):
    """On a GPU the backward runs in another thread, which does not see the block."""
    chosen = []
    select = bit_module.select

    def recording_select(op, implementations, *args):
        run = select(op, implementations, *args)
        chosen.append((op, next(b for b, i in implementations.items() if i.run is run)))
        return run

    for module in (bit_module, ternary_module):
        monkeypatch.setattr(module, "select", recording_select)
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    with use_backend("reference"):
        y = bit_linear(x, weight) + ternary_linear(x, PACKED)
    y.sum().backward()
    assert len(chosen) == 5
    assert {backend for _, backend in chosen} == {"reference"}


def test_what_is_kept_for_the_backward_is_the_int8_codes_of_the_input():
    x, weight = randn(64, 32).requires_grad_(), randn(16, 32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bit_linear(x, weight)
    shapes = sorted((tuple(t.shape), t.dtype) for t in saved if t is not weight)
    assert ((64, 32), torch.int8) in shapes
    assert not any(t.dtype.is_floating_point and t.numel() == x.numel() for t in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_by_the_user_equals_eager(dtype, device, backend):
    """Forward and backward, in one graph without breaks."""
    x = randn(2, 7, 24, dtype=dtype, device=device).requires_grad_()
    weight, bias = randn(24, 24, device=device), randn(24, device=device)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    packed = TernaryWeight.from_codes(random_codes(8, 24, device=device), 0.5)

    def block(x, weight, bias):
        y = bit_linear(x, weight, bias).relu() + bit_linear(x, weight, levels="binary")
        return ternary_linear(y, packed)

    def gradients(function):
        y = function(x, weight, bias)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))

    with use_backend(backend):
        eager = gradients(block)
        compiled = gradients(torch.compile(block, fullgraph=True))
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), compiled, eager):
        # what stands between the ops is fused: one more or one fewer rounding
        torch.testing.assert_close(
            a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-3, msg=name
        )


def test_compiled_by_the_user_under_autocast_and_with_frozen_weights(device):
    x, weight = randn(5, 24, device=device).requires_grad_(), randn(8, 24, device=device)

    def block(x):
        with torch.autocast(device, torch.bfloat16):
            return bit_linear(x, weight)

    y = torch.compile(block, fullgraph=True)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, block(x))
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.equal(dx, torch.autograd.grad(block(x).float().sum(), x)[0])


def test_registered_ops_keep_the_rules_of_torch_library(device):
    x, weight, bias = (randn(*s, device=device) for s in [(5, 24), (8, 24), (8,)])
    codes, scale = quantize_weight(weight)
    packed = TernaryWeight.from_codes(codes, scale)
    stats, dy = torch.cat([scale, scale * 0]), randn(5, 8, device=device)
    a, a_scale = torch.ops.bitnet_triton.quantize_activations_fwd(x)
    strided = randn(24, 8, device=device).t()
    ops = torch.ops.bitnet_triton

    def leaf(t):
        return t.detach().requires_grad_()

    for op, args in [
        (ops.quantize_activations_fwd, (x,)),
        (ops.weight_stats, (weight,)),
        (ops.ternary_linear_fwd, (leaf(x), packed.packed, packed.scale, leaf(bias))),
        (ops.ternary_linear_bwd, (dy, packed.packed, packed.scale)),
        (ops.bit_linear_fwd, (leaf(x), leaf(strided), None, stats, False)),
        (ops.bit_linear_fwd, (x.t().contiguous().t(), weight, bias, stats, True)),
        (ops.bit_linear_bwd_dx, (dy, strided, stats, False)),
        (ops.bit_linear_bwd_dweight, (dy.t().contiguous().t(), a, a_scale, torch.bfloat16)),
    ]:
        torch.library.opcheck(op.default, args)


@torch._dynamo.config.patch(recompile_limit=8)
def test_a_model_of_many_shapes_and_dtypes_meets_no_recompile_limit():
    """torch.compile keeps eight graphs of a function, then refuses or falls back to eager mode."""
    for dtype in (torch.float32, torch.bfloat16):
        for N, K in [(32, 32), (32, 24), (24, 32), (4, 40)]:
            weight = randn(N, K).requires_grad_()
            packed = TernaryWeight.from_codes(*quantize_weight(weight))
            for M in (1, 2, 24, 32):
                for bias in (None, randn(N)):
                    x = randn(M, K, dtype=dtype).requires_grad_()
                    with use_backend("compile"):
                        y = ternary_linear(x, packed, bias)
                        (bit_linear(x, weight, bias) + y).sum().backward()
                        with torch.no_grad(), torch.autocast("cpu", torch.float16):
                            bit_linear(x, weight, bias, levels="binary")
                    with use_backend("reference"):
                        assert torch.equal(y, ternary_linear(x, packed, bias))
