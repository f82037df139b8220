"""What triton_cpu changes in Triton, when, and how it takes that back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.backends import backends

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import compat, driver


@triton.jit
def double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * 2)


@pytest.fixture
def installed():
    triton_cpu.install()
    yield
    triton_cpu.uninstall()


class ForeignDriver:
    """Stands for the driver of a GPU."""

    def __getattr__(self, name):
        raise AssertionError(f"nobody should ask for {name}")


@pytest.fixture
def foreign(monkeypatch):
    mine = ForeignDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", mine)
    return mine


def doubles(launch):
    x, out = torch.randn(16), torch.empty(16)
    launch(x, out, BLOCK=16)
    return torch.equal(out, x * 2)


def test_install_makes_any_launch_run_on_the_cpu(installed):
    assert doubles(double_kernel[(1,)])


def test_uninstall_restores_the_driver(foreign):
    triton_cpu.install()
    assert doubles(double_kernel[(1,)])
    triton_cpu.uninstall()
    assert compat.active_driver() is foreign


def test_install_twice_is_installed_once(foreign):
    triton_cpu.install()
    triton_cpu.install()
    triton_cpu.uninstall()
    assert compat.active_driver() is foreign
    triton_cpu.uninstall()
    assert compat.active_driver() is foreign


def test_uninstall_leaves_a_driver_that_came_later(foreign):
    triton_cpu.install()
    later = ForeignDriver()
    compat.set_active_driver(later)
    triton_cpu.uninstall()
    assert compat.active_driver() is later


def test_launch_leaves_the_active_driver_alone(foreign):
    assert doubles(triton_cpu.launch(double_kernel, (1,)))
    assert compat.active_driver() is foreign


def test_kernels_of_the_cpu_are_kept_apart_from_those_of_a_gpu(installed):
    assert doubles(double_kernel[(1,)])
    assert driver.DEVICE in double_kernel.device_caches
    assert 0 not in double_kernel.device_caches
    triton_cpu.uninstall()
    assert driver.DEVICE not in double_kernel.device_caches


def test_triton_does_not_choose_the_cpu_by_itself(monkeypatch):
    assert doubles(triton_cpu.launch(double_kernel, (1,)))
    assert not backends["tcpu"].driver.is_active()
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", "tcpu")
    assert backends["tcpu"].driver.is_active()


def test_importing_registers_nothing():
    code = """
import sys, bitnet_triton.triton_cpu as triton_cpu
assert "triton" not in sys.modules, "imports Triton"
import triton
assert "tcpu" not in triton.backends.backends
assert triton.runtime.driver._active is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_takes_it_for_no_gpu_and_not_for_triton_cpu():
    from torch.utils._triton import has_triton

    assert doubles(triton_cpu.launch(double_kernel, (1,)))
    assert "cpu" not in backends
    assert not triton_cpu.real_triton_cpu()
    assert has_triton() == torch.cuda.is_available()


def test_real_triton_cpu_is_found(monkeypatch):
    monkeypatch.setitem(backends, "cpu", backends.get("nvidia"))
    assert triton_cpu.real_triton_cpu()


def test_install_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr("bitnet_triton.triton_cpu.interface.objection", lambda: "no compiler")
    with pytest.raises(RuntimeError, match="cannot run Triton kernels on the CPU: no compiler"):
        triton_cpu.install()


def test_benchmarks_of_triton_run(installed):
    x, out = torch.randn(16), torch.empty(16)
    milliseconds = triton.testing.do_bench(
        lambda: double_kernel[(1,)](x, out, BLOCK=16), warmup=1, rep=2
    )
    assert 0 < milliseconds < 1000


def test_tuners_time_gpu_kernels_with_the_driver_of_the_gpu(installed):
    """A tuner keeps the function that it was given while the CPU was installed."""
    bench = compat.active_driver().get_benchmarker()

    class Gpu(ForeignDriver):
        def get_benchmarker(self):
            return lambda call, **options: "timed on the GPU"

    compat.set_active_driver(Gpu())
    assert bench(lambda: None, quantiles=(0.5,)) == "timed on the GPU"


def test_launch_hooks_are_called(installed):
    from triton import knobs

    seen = []
    knobs.runtime.launch_enter_hook.add(lambda data: seen.append(data.get()["name"]))
    try:
        assert doubles(double_kernel[(1,)])
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    assert seen == ["double_kernel"]


@triton.jit
def softmax_kernel(out_ptr, x_ptr, x_step, out_step, rows, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_step + i, mask=i < columns, other=-float("inf"))
        power = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * out_step + i, power / tl.sum(power, axis=0), mask=i < columns)


@pytest.mark.parametrize("warps", [1, 4, 8, 32])
def test_host_code_computes_occupancy(installed, warps):
    """As Triton's tutorial of the fused softmax does."""
    properties = triton.runtime.driver.active.utils.get_device_properties(0)
    x = torch.randn(37, 50)
    out = torch.full_like(x, torch.nan)
    arguments = out, x, x.stride(0), out.stride(0), *x.shape
    kernel = softmax_kernel.warmup(*arguments, BLOCK=64, num_warps=warps, grid=(1,))
    kernel._init_handles()
    registers, memory = kernel.n_regs, kernel.metadata.shared
    by_registers = properties["max_num_regs"] // (registers * properties["warpSize"] * warps)
    by_memory = properties["max_shared_mem"] // memory
    assert 1 <= min(by_registers, by_memory) <= 64
    programs = properties["multiprocessor_count"] * min(by_registers, by_memory)
    softmax_kernel[(min(programs, 37), 1, 1)](*arguments, 64, num_warps=warps)
    torch.testing.assert_close(out, x.softmax(1))


@triton.jit
def large_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.cumsum(tl.load(x_ptr + i))
    tl.store(out_ptr + i, tl.cumsum(x))


def test_a_kernel_says_what_memory_its_blocks_take(installed):
    sizes = [2**10, 2**12, 2**14]
    x = torch.zeros(sizes[-1])
    kernels = [large_kernel.warmup(x, x, BLOCK=size, grid=(1,)) for size in sizes]
    memory = [kernel.metadata.shared for kernel in kernels]
    assert memory[0] >= 2 * 4 * sizes[0]  # two blocks of float32 are there at once
    assert memory == [memory[0], 4 * memory[0], 16 * memory[0]]
