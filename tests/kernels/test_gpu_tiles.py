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
from bitnet_triton.kernels.ternary_linear.gemv import launch_ternary_linear_fwd_one
from bitnet_triton.kernels.ternary_linear.tiles import IN_PLACE_K
from bitnet_triton.runtime import autotune, backend_objection

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    backend_objection("triton", CPU) is not None, reason="Triton cannot run here"
)
LAUNCHERS = {
    "ternary_linear_fwd": launch_ternary_linear_fwd,
    "ternary_linear_fwd_few": launch_ternary_linear_fwd_few,
    "ternary_linear_fwd_few_narrow": launch_ternary_linear_fwd_few,
    "ternary_linear_fwd_one": launch_ternary_linear_fwd_one,
}
# every GPU has tiles of its own
CLASSES = [
    (gpu, kernel, size)
    for gpu, tables in autotune.GPU_TABLES.items()
    for kernel in LAUNCHERS
    for size in tables.get(kernel, ())
]
GPU = pytest.mark.parametrize(("gpu", "kernel"), dict.fromkeys(c[:2] for c in CLASSES))


@pytest.fixture(autouse=True)
def gpu_tables(request, monkeypatch):
    gpu = request.getfixturevalue("gpu") if "gpu" in request.fixturenames else "cuda"
    tables = autotune.GPU_TABLES[gpu]
    for kernel in LAUNCHERS.keys() & tables.keys():
        classes = {
            size: {k: v for k, v in config.items() if not k.startswith("num_")}
            for size, config in tables[kernel].items()
        }
        monkeypatch.setitem(autotune.CPU, kernel, classes)


def run(kernel, M, K, parts, *, largest=0):
    """Multiply by a kernel; return y, and y by float64. ``largest`` stands for all codes."""
    draw = torch.randint(-1, 2, (sum(parts), K), dtype=torch.int8)
    codes = torch.full_like(draw, largest) if largest else draw
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


@pytest.mark.parametrize(("gpu", "kernel", "size"), CLASSES)
def test_tiles_of_every_size_class_give_the_product(gpu, kernel, size):
    M, K = 70 if size > 64 else size - 3, 300
    if kernel == "ternary_linear_fwd" and size > 1024:
        M = 1025
    if kernel == "ternary_linear_fwd_one":
        M, K = 1, min(size, 6000)
    assert_equal_but_for_rounding(*run(kernel, M, K, (72, 20, 4)))


@GPU
@pytest.mark.parametrize("K", [4, 1500])
def test_columns_beyond_whole_slices_count(gpu, kernel, K):
    M = 1 if kernel == "ternary_linear_fwd_one" else 3
    assert_equal_but_for_rounding(*run(kernel, M, K, (40,)))


@GPU
@pytest.mark.parametrize("code", [-1, 1])
def test_largest_sums_fit_into_32_bits(gpu, kernel, code):
    """The last plane holds -128 for -1, or 128 for 1: with activations of -128, the most of all."""
    assert_equal_but_for_rounding(*run(kernel, 1, IN_PLACE_K - 4, (4,), largest=code))


def test_longer_rows_are_multiplied_shifted_apart():
    assert_equal_but_for_rounding(*run("ternary_linear_fwd", 1, IN_PLACE_K + 5, (4,), largest=-1))


FEW, MANY, ONE = (
    launch_ternary_linear_fwd_few, launch_ternary_linear_fwd, launch_ternary_linear_fwd_one
)  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "M", "K", "chosen"),
    [
        ("cuda", 1, 64, ONE),
        ("sm_90", 1, 64, ONE),
        ("cuda", 1, 63, FEW),  # rows that start between words
        ("hip", 1, 64, FEW),
        ("cuda", 2, 64, FEW),
        ("cuda", 64, 64, FEW),
        ("cuda", 65, 64, MANY),
        ("cuda", 1, IN_PLACE_K, MANY),
    ],
)
def test_kernel_for_few_tokens_is_chosen_on_gpus_where_it_may(gpu, M, K, chosen):
    x, packed = (torch.empty(rows, K, device="meta") for rows in (M, 8))
    with autotune.tiles_for(gpu):
        assert launchers.packed_launcher(x, packed) is chosen
        assert launchers.packed_launcher(torch.empty(1, 4), torch.empty(8, 4)) is MANY
