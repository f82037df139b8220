"""Launches, started or only recorded, and the tiles they take."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from bitnet_triton import BackendUnavailableError, triton_cpu, use_backend
from bitnet_triton.runtime import Implementation, launch
from bitnet_triton.runtime.autotune import all_tiles, largest_size, tiles
from bitnet_triton.runtime.launch import record_launches

started = []


class Kernel:
    def __getitem__(self, grid):
        return lambda *args, **options: started.append((grid, args, options))


ON_A_GPU = SimpleNamespace(is_cpu=False)


@pytest.fixture(autouse=True)
def _forget():
    started.clear()


def test_a_launch_on_a_gpu_starts_the_kernel():
    launch(Kernel(), (2, 3))(ON_A_GPU, "x", BLOCK=4)
    assert started == [((2, 3), (ON_A_GPU, "x"), {"BLOCK": 4})]


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) * 2)


@pytest.mark.skipif(triton_cpu.objection() is not None, reason="needs a C++ compiler")
def test_a_launch_on_the_cpu_runs_the_compiled_kernel():
    x = torch.randn(16)
    expected = x * 2
    launch(double_kernel, (1,))(x, BLOCK=16)
    assert torch.equal(x, expected)


def test_a_recorded_launch_starts_nothing_and_only_inside_the_block():
    kernel = Kernel()
    with record_launches() as launches:
        launch(kernel, (2, 3))(1, "x", BLOCK=4)
    assert started == []
    (recorded,) = launches
    assert (recorded.kernel, recorded.grid) == (kernel, (2, 3))
    assert (recorded.args, recorded.options) == ((1, "x"), {"BLOCK": 4})
    launch(kernel, (1,))(ON_A_GPU)
    assert len(started) == len(launches) == 1


GPU = torch.device("cuda")


def test_tiles_are_the_first_that_are_large_enough():
    few, many = all_tiles()["ternary_linear_fwd"]
    assert tiles("ternary_linear_fwd", 1, GPU) == tiles("ternary_linear_fwd", 1024, GPU) == few
    assert tiles("ternary_linear_fwd", 1025, GPU) == tiles("ternary_linear_fwd", 10**9, GPU) == many
    assert few != many


def test_a_program_of_the_quantiser_holds_the_whole_row():
    largest = largest_size("quantize_activations_fwd")
    for length in (1, 1024, 1025, 6912, largest):
        block = tiles("quantize_activations_fwd", length, GPU)["BLOCK_K"]
        assert block >= length
        assert block & (block - 1) == 0
    with pytest.raises(ValueError, match="has tiles up to"):
        tiles("quantize_activations_fwd", largest + 1, GPU)


def test_a_row_that_no_program_holds_is_refused_by_the_triton_quantiser():
    from bitnet_triton.kernels.quantize.op import ACTIVATIONS_FWD

    supports = ACTIVATIONS_FWD["triton"].supports
    largest = largest_size("quantize_activations_fwd")
    assert supports(torch.empty(1, largest, device="meta")) is None
    assert "at most" in supports(torch.empty(1, largest + 1, device="meta"))


def test_the_separate_project_triton_cpu_is_taken_only_when_it_is_forced(monkeypatch):
    chooser = importlib.import_module("bitnet_triton.runtime.select")
    starter = importlib.import_module("bitnet_triton.runtime.launch")
    table = {"triton": Implementation(lambda: "kernels")}
    with use_backend("triton-cpu"), pytest.raises(BackendUnavailableError, match="not installed"):
        chooser.select("op", table, torch.device("cpu"))

    monkeypatch.setattr(triton_cpu, "real_triton_cpu", lambda: True)
    monkeypatch.setattr(starter, "_may_be_forced", lambda: True)
    chooser._device_objection.cache_clear()
    started = []
    kernel = {(2,): lambda *args, **options: started.append((args, options))}
    x = torch.ones(1)
    with use_backend("triton-cpu"):
        assert chooser.select("op", table, torch.device("cpu"))() == "kernels"
        launch(kernel, (2,))(x, 3, BLOCK=4)
    assert started == [((x, 3), {"BLOCK": 4})]
    chooser._device_objection.cache_clear()
