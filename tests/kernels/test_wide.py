"""Kernels at the sizes of published models, where there is a GPU; elsewhere at small ones.

Other tests have every option at small sizes. These have tiles for many rows, long sums, more rows
than programs, and addresses far apart.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import (
    Int8Weight,
    Mask,
    TernaryWeight,
    bit_linear,
    flash_attention,
    int8_linear,
    quantize_activations,
    rms_norm,
    ternary_linear,
)
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.kernels.int8_linear.reference import split_activations_reference
from bitnet_triton.kernels.quantize.reference import quantize_activations_reference
from bitnet_triton.kernels.rms_norm.reference import rms_norm_reference
from bitnet_triton.kernels.ternary_linear.reference import ternary_linear_reference
from bitnet_triton.runtime import backend_objection
from bitnet_triton.testing import RMS_LIMITS, assert_close, random_codes

DTYPES = [torch.float32, torch.bfloat16]
# (M, N, K)
PACKED = {
    "cpu": [(5, 20, 64)],
    "cuda": [(1, 6912, 2560), (5, 2560, 6912), (16, 3840, 2560), (513, 640, 2560)],
}
TRAINED = {"cpu": [(33, 20, 65)], "cuda": [(512, 2560, 2560), (257, 129, 65)]}
HEADS = {"cpu": [(5, 130, 100)], "cuda": [(1, 32064, 2560), (7, 1030, 515), (40, 2048, 2560)]}
ROWS = {"cpu": [(5, 100)], "cuda": [(2049, 6912), (33, 1025)]}
# tokens, size of a head
LONG = {"cpu": [(70, 32)], "cuda": [(515, 64), (515, 128), (515, 256)]}
CACHED = {"cpu": 90, "cuda": 4099}
WINDOWS = [Mask(), Mask(causal=False), Mask(window=70), Mask(window=30, sinks=5)]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _kernels_alone(device):
    """Let a kernel that cannot run be a failure, and no reference in its place."""
    if (objection := backend_objection("triton", torch.device(device))) is not None:
        assert device == "cpu", objection
        pytest.skip(objection)
    with use_backend("triton"):
        yield


def own_quantisation(M, K, device):
    """Return float64 rows that the quantiser maps to themselves: quantisers jump beside a tie."""
    codes = torch.randint(-126, 127, (M, K), device=device).double()
    return codes.scatter_(1, torch.randint(K, (M, 1), device=device), 127.0) / 32


def gradients(function, inputs, dy):
    """Return the output y, and the gradient of each input as d0, d1, ..."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{i}": grad for i, grad in enumerate(grads)}


def limits_of_sums(eager, exact, terms):
    """Return limits of a float32 gradient that adds so many products one by one.

    Each addition rounds a partial sum by at most eps / 2 of it, and no partial sum is expected to
    be larger than the largest result. Independent roundings add up like sqrt(terms): eps / 2 times
    that is the limit of the RMS error, and twice as much, of the largest result, that of the worst
    element. cuBLAS adds in parts, so that its own error says little about other orders: it counts,
    as in ``assert_close``, where the terms are few.
    """
    if eager.dtype != torch.float32:
        return {}
    step = torch.finfo(torch.float32).eps * max(8.0, math.sqrt(terms))
    worst = max(step * exact.abs().max().item(), 3 * (eager - exact).abs().max().item())
    return {"rms": max(RMS_LIMITS[torch.float32], step / 2), "worst": worst}


def assert_all_close(what, ours, eager, exact, terms):
    for name, value in exact.items():
        limits = limits_of_sums(eager[name], value, terms[name]) if name in terms else {}
        assert_close(f"{what} {name}", ours[name], value, eager=eager[name], **limits)


def test_packed_products(dtype, device):
    for M, N, K in PACKED[device]:
        weight = TernaryWeight.from_codes(random_codes(N, K, device=device), 0.0371)
        codes, scale = weight.codes(), weight.scale.double()

        def reference(x, codes=codes, scale=scale):
            return ternary_linear_reference(x, codes.to(x), scale.to(x), None)

        x = own_quantisation(M, K, device)
        dy = torch.randn(M, N, device=device).to(dtype)
        assert_all_close(
            (M, N, K),
            gradients(lambda x, weight=weight: ternary_linear(x, weight), [x.to(dtype)], dy),
            gradients(reference, [x.to(dtype)], dy),
            gradients(reference, [x], dy.double()),
            {"d0": N},
        )


@pytest.mark.parametrize("levels", ["ternary", "binary"])
def test_trained_products(levels, dtype, device):
    for M, N, K in TRAINED[device]:
        signs = random_codes(N, K, device=device).double()
        if levels == "binary":  # as many of each: their mean stays between them
            signs = torch.arange(N * K, device=device).remainder(2).mul(2).sub(1).double()
            signs = signs[torch.randperm(N * K, device=device)].view(N, K)
        masters = 0.05 * (signs + 0.3 * (torch.rand_like(signs) - 0.5))
        inputs = [own_quantisation(M, K, device), masters.to(dtype).double()]
        narrow = [t.to(dtype) for t in inputs]
        dy = torch.randn(M, N, device=device).to(dtype)
        reference = functools.partial(bit_linear_reference, levels=levels)
        assert_all_close(
            (M, N, K),
            gradients(functools.partial(bit_linear, levels=levels), narrow, dy),
            gradients(reference, narrow, dy),
            gradients(reference, inputs, dy.double()),
            {"d0": N, "d1": M},
        )


def test_output_heads(dtype, device):
    for M, N, K in HEADS[device]:
        x = torch.randn(M, K, device=device).to(dtype)
        weight = Int8Weight.from_dense(torch.randn(N, K, device=device))
        # split in float32, as the op does: beside a tie float64 rounds another way
        high, low, step = (t.double() for t in split_activations_reference(x.float()))
        exact = (128 * high + low) * step[:, None] @ weight.dequantize(torch.float64).t()
        assert_close(f"{(M, N, K)} y", int8_linear(x, weight), exact)


def test_rows(dtype, device, assert_rounded):
    for M, D in ROWS[device]:
        x, weight = torch.randn(M, D, device=device).to(dtype), torch.rand(D, device=device)
        codes, scale = quantize_activations(x)
        _, exact_scale = quantize_activations_reference(x.double())
        assert_close(f"{(M, D)} scale", scale, exact_scale)
        assert_rounded(codes, x.double() / exact_scale)
        dy = torch.randn(M, D, device=device).to(dtype)
        inputs = [x, weight.to(dtype)]
        reference = functools.partial(rms_norm_reference, eps=1e-5)
        assert_all_close(
            (M, D),
            gradients(functools.partial(rms_norm, eps=1e-5), inputs, dy),
            gradients(reference, inputs, dy),
            gradients(reference, [t.double() for t in inputs], dy.double()),
            {"d1": M},
        )


@pytest.mark.parametrize("mask", WINDOWS, ids=["causal", "full", "window", "sinks"])
def test_attention(mask, dtype, device):
    for T, D in LONG[device]:
        q, dout = (torch.randn(2, T, 4, D, device=device).to(dtype) for _ in range(2))
        k, v = (torch.randn(2, T, 2, D, device=device).to(dtype) for _ in range(2))

        def reference(q, k, v, mask=mask, D=D):
            return attention_reference(q, k, v, mask=mask, scale=D**-0.5)[0]

        assert_all_close(
            (T, D),
            gradients(functools.partial(flash_attention, mask=mask), (q, k, v), dout),
            gradients(reference, (q, k, v), dout),
            gradients(reference, [t.double() for t in (q, k, v)], dout.double()),
            {"d0": T, "d1": 2 * T, "d2": 2 * T},
        )


@pytest.mark.parametrize("tokens", [1, 4])
def test_steps_behind_a_long_padded_cache(tokens, dtype, device):
    T, D = CACHED[device], 128
    q = torch.randn(2, tokens, 20, D, device=device).to(dtype)
    k, v = (torch.randn(2, T, 5, D, device=device).to(dtype) for _ in range(2))
    left, used = (3, T // 2), (T - 7, T // 2 + 1 + tokens)
    for row in range(2):  # what stands where no valid key is may be anything
        for t in (k, v):
            t[row, : left[row]] = t[row, used[row] :] = float("nan")
    lengths = {
        name: torch.tensor(values, dtype=torch.int32, device=device)
        for name, values in (("leftpad_k", left), ("seqused_k", used))
    }
    settings = {"mask": Mask(window=T // 3, sinks=4), "scale": D**-0.5, **lengths}
    with torch.no_grad():
        out = flash_attention(q, k, v, **settings)
        exact, _ = attention_reference(*(t.double() for t in (q, k, v)), **settings)
        eager, _ = attention_reference(q, k, v, **settings)
    # averages of many values, added share by share where the reference adds pairwise
    worst = {"worst": 3e-6} if dtype == torch.float32 else {}
    assert_close("out", out, exact, eager=eager, **worst)
