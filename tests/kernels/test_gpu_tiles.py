"""The kernels of the packed linear in the tiles and the structure that only GPUs use, on a CPU.

Which kernel multiplies is decided by the device, so its launchers are called by name here, with the
table for GPUs in place of the one for CPUs.
"""

import pytest
import torch

from bitnet_triton.kernels import MergedTernaryWeight, TernaryWeight
from bitnet_triton.kernels.ternary_linear import launchers
from bitnet_triton.kernels.ternary_linear.decode import launch_ternary_linear_fwd_few
from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd
from bitnet_triton.kernels.ternary_linear.tiles import IN_PLACE_K
from bitnet_triton.runtime import autotune, backend_objection

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    backend_objection("triton", CPU) is not None, reason="Triton cannot run here"
)
LAUNCHERS = {
    "ternary_linear_fwd": launch_ternary_linear_fwd,
    "ternary_linear_fwd_few": launch_ternary_linear_fwd_few,
}
CLASSES = [(kernel, size) for kernel in LAUNCHERS for size in autotune._GPU[kernel]]


@pytest.fixture(autouse=True)
def gpu_tables(monkeypatch):
    for kernel in LAUNCHERS:
        classes = {
            size: {k: v for k, v in config.items() if not k.startswith("num_")}
            for size, config in autotune._GPU[kernel].items()
        }
        monkeypatch.setitem(autotune._CPU, kernel, classes)


def run(kernel, M, K, parts, *, largest=False):
    """Multiply by a kernel; return y, and y by float64."""
    draw = torch.randint(-1, 2, (sum(parts), K), dtype=torch.int8)
    codes = -torch.ones_like(draw) if largest else draw
    weights = [
        TernaryWeight.from_codes(c, 0.01 * (i + 1)) for i, c in enumerate(codes.split(list(parts)))
    ]
    merged = MergedTernaryWeight.merge(weights)
    a = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    if largest:
        a.fill_(-128)
    scale, residual = torch.rand(M, 1), torch.randn(M, sum(parts))
    y = LAUNCHERS[kernel](
        a, scale, a.sum(-1, dtype=torch.int32), merged.packed, merged.scale, None, residual,
        merged.rows, torch.float32,
    )  # fmt: skip
    products = [(a.double() @ w.codes().double().t()) * w.scale.double() for w in weights]
    return y, torch.cat(products, -1) * scale.double() + residual.double()


def assert_equal_but_for_rounding(y, exact):
    # sums are exact: what is left is three roundings to float32
    assert ((y - exact).abs() <= 4e-7 * exact.abs().max()).all()


@pytest.mark.parametrize(("kernel", "size"), CLASSES)
def test_tiles_of_every_size_class_give_the_product(kernel, size):
    M = 70 if size > 64 else size - 3
    if kernel == "ternary_linear_fwd" and size > 1024:
        M = 1025
    assert_equal_but_for_rounding(*run(kernel, M, 300, (72, 20, 4)))


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_columns_beyond_whole_slices_count(kernel):
    assert_equal_but_for_rounding(*run(kernel, 3, 1500, (40,)))


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_largest_sums_fit_into_32_bits(kernel):
    """The last plane holds -128 for a code of -1: with activations of -128, the most there is."""
    assert_equal_but_for_rounding(*run(kernel, 1, IN_PLACE_K - 1, (4,), largest=True))


def test_longer_rows_are_multiplied_shifted_apart():
    assert_equal_but_for_rounding(*run("ternary_linear_fwd", 1, IN_PLACE_K + 5, (4,), largest=True))


@pytest.mark.parametrize(
    ("M", "K", "few"),
    [(1, 64, True), (64, 64, True), (65, 64, False), (1, IN_PLACE_K, False)],
)
def test_kernel_for_few_tokens_is_chosen_on_gpus_where_it_may(M, K, few, monkeypatch):
    x = torch.empty(M, K, device="meta")
    chosen = launch_ternary_linear_fwd_few if few else launch_ternary_linear_fwd
    assert launchers._packed_launcher(x) is chosen
    assert launchers._packed_launcher(torch.empty(1, 4)) is launch_ternary_linear_fwd
