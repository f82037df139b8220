"""bit_linear where its kernels have edges: tiles that hang over, rows without spread, mixed dtypes.

What it shares with ternary_linear (dtypes, backends, autocast) stands in test_ternary_linear.py.
"""

from __future__ import annotations

import logging

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import bit_linear, quantize_activations
from bitnet_triton.kernels.bit_linear import launchers, products
from bitnet_triton.kernels.bit_linear.backward import launch_bit_linear_bwd_dweight
from bitnet_triton.kernels.bit_linear.forward import (
    launch_bit_linear_codes,
    launch_bit_linear_fwd_from_codes,
)
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference
from bitnet_triton.kernels.quantize.op import weight_stats
from bitnet_triton.kernels.quantize.reference import weight_codes_reference
from bitnet_triton.runtime import backend_objection
from bitnet_triton.runtime.autotune import fitted_tiles, tiles, tiles_for
from bitnet_triton.testing import assert_close, randn, random_codes

LEVELS = ["ternary", "binary"]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# activations, master weights
MIXES = [(F32, F32), (BF16, BF16), (BF16, F32)]
# M, N, K: one of everything; whole tiles of a CPU and a bit; odd in each dimension
SHAPES = [(1, 1, 1), (130, 66, 290), (257, 129, 65)]
CASES = [(shape, mix) for shape in SHAPES for mix in MIXES]
CASES += [((257, 129, 65), (F16, F16)), ((257, 129, 65), (F32, BF16))]
CASES += [((39, 20, 256), (BF16, BF16))]  # K in whole tiles of a GPU
KERNELS = ["bit_linear_fwd", "bit_linear_bwd_dx", "bit_linear_bwd_dweight"]
needs_triton = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)


@pytest.fixture(params=["on_the_way", "once"])
def way(request, monkeypatch):
    """Make quantised operands for every tile, as on a CPU, or once, as on a GPU, on any device."""
    once = request.param == "once"
    monkeypatch.setattr(launchers, "_makes_once", lambda _: once)
    monkeypatch.setattr(launchers, "largest_size", lambda _: 0)
    monkeypatch.setattr(products, "product_objection", lambda *_: None)
    return request.param


def rows_with_edges(M, K):
    """Activations that quantise to themselves; the second row is zero, the third all equal."""
    x = torch.randint(-126, 127, (M, K)).double()
    x[:, torch.randint(K, ()).item()] = 127
    x[1:2] = 0
    x[2:3] = -127
    return x / 32


def masters(N, K, levels):
    """Master weights away from every threshold of their quantiser, binary ones with mean 0.02."""
    codes = random_codes(N, K).double()
    if levels == "binary":
        codes = codes.abs() * 2 - 1
        codes.view(-1)[: N * K // 2] = -1
        codes.view(-1)[N * K // 2 : N * K // 2 * 2] = 1
        codes = codes.view(-1)[torch.randperm(N * K)].view(N, K)
    noise = torch.rand(N, K, dtype=torch.float64) - 0.5
    return 0.05 * (codes + 0.3 * noise) + (0.02 if levels == "binary" else 0.0)


def run(op, x, weight, bias, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = op(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients)))


def limits(ours, eager, exact):
    """Limits of ``assert_close`` beside those of the dtype."""
    if eager.dtype == BF16 and ours.dtype == BF16:
        return {"eager": eager}
    if ours.dtype == F16:
        return {}
    error = (eager.double() - exact).abs().max() + exact.abs().max() * torch.finfo(ours.dtype).eps
    # a tile adds up one product after the other, BLAS in several parts: it is the more exact one
    worst = {"worst": 4 * error.item()}
    # a float32 sum of products of bfloat16 operands is no better than they are
    return worst if eager.dtype == F32 else {**worst, "rms": 8e-3}


@pytest.mark.pairwise
@pytest.mark.parametrize(("shape", "dtypes"), CASES, ids=str)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.backends("triton")
def test_output_and_gradients_match_float64(shape, dtypes, levels, device, backend, way):
    (M, N, K), (x_dtype, weight_dtype) = shape, dtypes
    x = rows_with_edges(M, K).to(x_dtype)
    weight, bias = masters(N, K, levels).to(weight_dtype), randn(N, dtype=weight_dtype)
    dy = randn(M, N, dtype=x_dtype)

    def op(*args):
        with use_backend(backend):
            return bit_linear(*args, levels=levels)

    def reference(*args):
        return bit_linear_reference(*args, levels=levels)

    ours = run(op, *(t.to(device) for t in (x, weight, bias, dy)))
    exact = run(reference, x.double(), weight.double(), bias.double(), dy.double())
    # in float16 the reference overflows where it divides by the magnitude of a row of zeros
    eager_dtype = F32 if x_dtype == F16 else x_dtype
    eager = run(reference, *(t.to(eager_dtype) for t in (x, weight, bias, dy)))
    for name, value in exact.items():
        assert_close(name, ours[name], value, **limits(ours[name], eager[name], value))
    assert ours["dweight"].dtype == weight_dtype


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("levels", LEVELS)
def test_both_directions_round_a_weight_beside_a_threshold_alike(
    levels, dtype, device, backend, way
):
    """The identity reads the codes out: forward in int8, backward in the dtype of dy."""
    weight = (randn(32, 32, device=device) * 0.02).to(dtype)
    stats = weight_stats(weight)
    for threshold in (stats[0] / 2, -stats[0] / 2, stats[1]):
        near = threshold.to(dtype)
        ends = torch.tensor([torch.inf, -torch.inf], dtype=dtype, device=device)
        beside = torch.stack([near, *torch.nextafter(near.expand(2), ends)])
        weight.view(-1)[torch.randperm(1024, device=device)[:30]] = beside.repeat(10)
    codes = weight_codes_reference(weight.float(), stats, levels=levels)
    eye = torch.eye(32, dtype=dtype, device=device)
    ops, binary = torch.ops.bitnet_triton, levels == "binary"
    with use_backend(backend):
        y, _, _ = ops.bit_linear_fwd(127 * eye, weight, None, stats, binary)
        dx = ops.bit_linear_bwd_dx(eye, weight, stats, binary)
    assert torch.equal(y, (127 * codes * stats[0]).t().to(dtype))
    assert torch.equal(dx, (codes * stats[0]).to(dtype))


@pytest.mark.parametrize("levels", LEVELS)
def test_rows_that_are_zero_or_all_equal_give_what_they_should(levels, device, backend, way):
    """A zero row adds nothing to dweight, whatever its dy; a row of c is quantised to c exactly."""
    x = torch.stack([torch.zeros(40), torch.full((40,), 0.3), torch.full((40,), -7.0)])
    weight, dy = masters(8, 40, levels).float(), randn(3, 8)
    x, weight, dy = (t.to(device).requires_grad_() for t in (x, weight, dy))
    with use_backend(backend):
        y = bit_linear(x, weight, levels=levels)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert y[0].eq(0).all()
    assert dx[0].ne(0).any()
    assert_close("dweight", dweight, dy.double().t() @ x.double())


def test_tokens_add_up_in_the_weight_gradient(device, backend):
    x, weight, dy = randn(37, 48, device=device), randn(24, 48, device=device), randn(37, 24)
    dy = dy.to(device)
    parts = []
    with use_backend(backend):
        for part in (slice(None), slice(0, 5), slice(5, 37)):
            leaf = weight.detach().requires_grad_()
            bit_linear(x[part], leaf).backward(dy[part])
            parts.append(leaf.grad)
    # two sums of 37 terms, each of which loses less than 6 sqrt(37) u of the magnitudes in it:
    # roundings are as good as independent (doi:10.1137/18M1226312)
    sizes = dy.abs().t() @ x.abs()
    worst = 2 * 6 * 37**0.5 * 2**-24 * sizes.max().item()
    assert_close("dweight", parts[1] + parts[2], parts[0].double(), worst=worst)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "launch", [launch_bit_linear_bwd_dweight, products.library_bit_linear_bwd_dweight]
)
def test_dweight_equals_the_product_of_what_the_codes_stand_for(launch, dtype, device):
    x, dy = randn(300, 77, dtype=dtype, device=device), randn(300, 51, dtype=dtype, device=device)
    codes, scale = quantize_activations(x)
    dweight = launch(dy, codes, scale, dtype)
    dequantised = (codes * scale).to(dtype)
    exact = dy.double().t() @ (codes.double() * scale.double())
    eager = (dy.float().t() @ dequantised.float()).to(dtype)
    assert_close("dweight", dweight, exact, **limits(dweight, eager, exact))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (70, 136, 131), (2048, 6912, 2560), (4096, 384, 1024)], ids=str
)
def test_tiles_for_a_cpu_waste_an_eighth_at_most(kernel, size):
    M, N, K = size
    fitted = fitted_tiles(kernel, torch.device("cpu"), M=M, N=N, K=K)
    largest = tiles(kernel, M, torch.device("cpu"))
    for name, extent in (("BLOCK_M", M), ("BLOCK_N", N), ("BLOCK_K", K)):
        block = fitted[name]
        wasted = -extent % block
        assert block == 16 or wasted <= extent / 8
        # no smaller than that asks for
        assert block == largest[name] or -extent % (2 * block) > extent / 8


def test_tiles_for_a_gpu_are_those_that_were_compiled_ahead_of_time():
    cuda = torch.device("cuda")
    with tiles_for("cuda"):
        for kernel in KERNELS:
            assert fitted_tiles(kernel, cuda, M=3, N=5, K=7) == tiles(kernel, 3, cuda)


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_what_is_frozen_saves_nothing_for_the_backward(frozen, device, way):
    x, weight = randn(64, 48, device=device), randn(24, 48, device=device)
    (x if frozen == "weight" else weight).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bit_linear(x, weight)
    kept = {(tuple(t.shape), t.dtype) for t in saved}
    if frozen == "weight":
        assert kept == {((24, 48), F32), ((2,), F32)}
    else:
        assert kept == {((64, 48), torch.int8), ((64, 1), F32)}


def quantized(M, N, K, device, dtype=F32):
    """Codes and scales of activations, master weights and their statistics."""
    weight = (0.02 * randn(N, K)).to(device, dtype)
    return (*quantize_activations(randn(M, K, device=device)), weight, weight_stats(weight))


@needs_triton
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("levels", LEVELS)
def test_codes_that_are_written_once_are_those_of_the_reference(levels, dtype, device):
    *_, weight, stats = quantized(1, 71, 131, device, dtype)
    exact = weight_codes_reference(weight.float(), stats, levels=levels)
    for result in (torch.int8, dtype):
        codes = launch_bit_linear_codes(weight, stats, levels == "binary", result)
        assert codes.dtype == result
        assert torch.equal(codes.float(), exact.float())


@needs_triton
@pytest.mark.parametrize("shape", [(1100, 300, 40), (1, 260, 384), (9, 1, 300)], ids=str)
def test_every_tile_of_a_grouped_grid_is_the_product(shape, device):
    """More tiles of tokens than a group has, a last group with less, several tiles of K."""
    a, scale, weight, stats = quantized(*shape, device)
    y = launch_bit_linear_fwd_from_codes(a, scale, weight, stats, None, False, F32)
    codes = weight_codes_reference(weight, stats, levels="ternary")
    exact = (a.double() @ codes.double().t()) * scale.double() * stats[0].double()
    assert_close("y", y, exact)


@needs_triton
def test_float16_overflows_in_dx_only_where_the_result_does(device):
    weight = torch.full((256, 8), 0.02, device=device)
    dy = torch.full((3, 256), 1000.0, dtype=F16, device=device)
    dx = products.library_bit_linear_bwd_dx(dy, weight, weight_stats(weight), False)
    assert_close("dx", dx, torch.full((3, 8), 256 * 1000.0 * 0.02, dtype=torch.float64))


@pytest.mark.backends("triton")
def test_no_tokens_give_no_gradient(device, backend, way):
    x, weight = torch.empty(0, 48, device=device), randn(24, 48, device=device)
    with use_backend(backend):
        y = bit_linear(x.requires_grad_(), weight.requires_grad_())
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.shape, dx.shape) == ((0, 24), (0, 48))
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.backends("triton")
def test_each_way_is_taken_where_it_is_chosen(device, backend, way, monkeypatch):
    results = []
    product = products.product
    monkeypatch.setattr(products, "product", lambda *a: results.append(a[2]) or product(*a))
    x, weight = randn(5, 48, device=device, dtype=BF16), randn(24, 48, device=device)
    with use_backend(backend):
        bit_linear(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert results == ([F32, F32] if way == "once" else [])


def test_few_tokens_make_codes_on_the_way(device):
    """What decides is the table: a forward of more tokens than it has tiles for reads codes."""
    assert launchers.largest_size("bit_linear_fwd") == 256
    assert launchers._makes_once(torch.device(device)) == (device == "cuda")


def test_a_library_without_float32_results_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(launchers, "_makes_once", lambda _: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launchers._log_own_product.cache_clear()
    dy = torch.empty(1, 1, dtype=BF16)
    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        for _ in range(2):
            assert not launchers._library_multiplies("bit_linear_bwd_dx", dy, F32)
            assert launchers._library_multiplies("bit_linear_bwd_dweight", dy, BF16)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "bit_linear_bwd_dx" in record.message
    assert "ROCm" in record.message


def test_a_tuned_product_has_no_float32_result(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    for enabled in (False, True):
        monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda on=enabled: on)
        assert (products.product_objection(BF16, F32) is None) == (not enabled)
        assert products.product_objection(F32, F32) is None
