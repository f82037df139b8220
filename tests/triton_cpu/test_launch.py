"""Launches: grids, checks before a kernel runs, arguments that share memory, tuning, threads."""

from __future__ import annotations

import mmap
import multiprocessing
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import build, driver, launcher
from bitnet_triton.triton_cpu.side import prepared

SCALE = tl.constexpr(2)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    y = tl.load(y_ptr + i, mask=i < n, other=0)
    tl.store(out_ptr + i, x + y, mask=i < n)


@triton.jit
def places_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + place, 100 * x + 10 * y + z)


@pytest.fixture
def installed():
    triton_cpu.install()
    yield
    triton_cpu.uninstall()


class TestGrid:
    @pytest.mark.parametrize("grid", [(3,), (3, 2), (3, 2, 4), [2], (np.int64(3), np.int32(1))])
    def test_of_one_to_three_sizes(self, grid):
        sizes = [int(n) for n in (*grid, 1, 1)][:3]
        out = torch.full(sizes, -1)
        triton_cpu.launch(places_kernel, grid)(out)
        x, y, z = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
        assert torch.equal(out, 100 * x + 10 * y + z)

    def test_may_be_a_function_of_the_arguments(self):
        seen = {}

        def grid(arguments):
            seen.update(arguments)
            return (triton.cdiv(arguments["n"], arguments["BLOCK"]),)

        x, y, out = torch.randn(100), torch.randn(100), torch.zeros(100)
        triton_cpu.launch(add_kernel, grid)(x, y, out, 100, BLOCK=32)
        assert torch.equal(out, x + y)
        assert list(seen) == ["x_ptr", "y_ptr", "out_ptr", "n", "BLOCK"]

    @pytest.mark.parametrize("grid", [(0,), (3, 0), (1, 1, 0)])
    def test_without_programs_runs_nothing(self, grid):
        out = torch.full((8,), -1)
        triton_cpu.launch(places_kernel, grid)(out)
        assert (out == -1).all()

    @pytest.mark.parametrize("grid", [(), (1, 1, 1, 1)])
    def test_of_no_or_four_sizes_is_refused(self, grid):
        with pytest.raises(ValueError, match="`grid`: expected one to three sizes"):
            triton_cpu.launch(places_kernel, grid)(torch.empty(1))

    @pytest.mark.parametrize("grid", [(-1,), (2**31,), (1, -5)])
    def test_out_of_range_is_refused(self, grid):
        with pytest.raises(ValueError, match="expected a grid of 0 to"):
            triton_cpu.launch(places_kernel, grid)(torch.empty(1))

    def test_of_fractions_is_refused(self):
        with pytest.raises(TypeError):
            triton_cpu.launch(places_kernel, (1.5,))(torch.empty(1))


class TestBadArguments:
    """What is wrong is named, and the kernel does not run."""

    def launch(self, *args, **kwargs):
        return triton_cpu.launch(add_kernel, (1,))(*args, **kwargs)

    def test_tensor_on_another_device(self):
        out = torch.full((8,), -1.0)
        with pytest.raises(ValueError, match=r"`y_ptr`: expected a tensor on the CPU.*`meta`"):
            self.launch(torch.ones(8), torch.ones(8, device="meta"), out, 8, BLOCK=8)
        assert (out == -1).all()

    def test_missing_argument(self):
        with pytest.raises(TypeError, match="add_kernel: missing a required argument: 'n'"):
            self.launch(torch.ones(8), torch.ones(8), torch.ones(8), BLOCK=8)

    def test_too_many_arguments(self):
        with pytest.raises(TypeError, match="add_kernel: too many positional arguments"):
            self.launch(torch.ones(8), torch.ones(8), torch.ones(8), 8, 8, 8)

    def test_unknown_keyword(self):
        with pytest.raises(KeyError, match="BLCK"):
            self.launch(torch.ones(8), torch.ones(8), torch.ones(8), 8, BLOCK=8, BLCK=8)

    def test_no_tensor_and_no_number(self):
        with pytest.raises(TypeError):
            self.launch(torch.ones(8), object(), torch.ones(8), 8, BLOCK=8)

    def test_number_that_does_not_fit_its_annotation(self):
        with pytest.raises(OverflowError, match="`n`: cannot pass 300 as i8"):
            triton_cpu.launch(small_kernel, (1,))(torch.empty(1), 300)
        with pytest.raises(TypeError, match=r"`n`: cannot pass 1\.5 as i8"):
            triton_cpu.launch(small_kernel, (1,))(torch.empty(1), 1.5)

    def test_element_of_a_tuple(self):
        with pytest.raises(ValueError, match=r"`pair\[1\]`: expected a tensor on the CPU"):
            triton_cpu.launch(pair_kernel, (1,))((torch.ones(4), torch.ones(4, device="meta")))


@triton.jit
def small_kernel(out_ptr, n: tl.int8):
    tl.store(out_ptr, n)


@triton.jit
def pair_kernel(pair):
    i = tl.arange(0, 4)
    tl.store(pair[1] + i, tl.load(pair[0] + i))


class TestArguments:
    def test_numbers_beyond_float32_become_infinite(self):
        out = torch.empty(2)
        triton_cpu.launch(floats_kernel, (1,))(out, 1e300, 1e6)
        assert out.tolist() == [float("inf"), float("inf")]

    def test_wrapped_tensors_are_read_as_another_type(self):
        x = torch.tensor([0x40, 0x38, 0x30, 0xB8], dtype=torch.uint8)
        out = torch.empty(4)
        wrapped = triton.reinterpret(x, tl.float8e4nv)
        triton_cpu.launch(convert_kernel, (1,))(wrapped, out, BLOCK=4)
        assert torch.equal(out, x.view(torch.float8_e4m3fn).float())

    def test_parameters_and_views_are_tensors(self):
        weight, table = torch.nn.Parameter(torch.randn(64)), torch.randn(2, 64)
        out = torch.empty(64)
        triton_cpu.launch(add_kernel, (2,))(weight, table[1], out, 64, BLOCK=32)
        assert torch.equal(out, weight.detach() + table[1])

    def test_equal_constants_of_other_types_are_other_kernels(self):
        out = torch.empty(1)
        for value, expected in [(1, 0.0), (1.0, 0.5), (1, 0.0)]:
            triton_cpu.launch(half_kernel, (1,))(out, VALUE=value)
            assert out.item() == expected

    def test_options_for_gpus_are_ignored(self):
        x, out = torch.randn(8), torch.empty(8)
        options = {"num_warps": 8, "num_stages": 3, "num_ctas": 1, "maxnreg": 128}
        triton_cpu.launch(add_kernel, (1,))(x, x, out, 8, BLOCK=8, **options)
        assert torch.equal(out, x + x)

    def test_changed_global_is_refused(self, monkeypatch):
        x, out = torch.randn(8), torch.empty(8)
        triton_cpu.launch(global_kernel, (1,))(x, out)
        assert torch.equal(out, x * 2)
        monkeypatch.setitem(globals(), "SCALE", tl.constexpr(3))
        with pytest.raises(RuntimeError, match="SCALE has changed"):
            triton_cpu.launch(global_kernel, (1,))(x, out)


@triton.jit
def floats_kernel(out_ptr, f, h: tl.float16):
    tl.store(out_ptr, f)
    tl.store(out_ptr + 1, h)


@triton.jit
def convert_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.float32))


@triton.jit
def half_kernel(out_ptr, VALUE: tl.constexpr):
    half: tl.constexpr = VALUE // 2 if isinstance(VALUE, int) else VALUE / 2
    tl.store(out_ptr, half)


@triton.jit
def global_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 8)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * SCALE)


@triton.jit
def shift_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i + 1, tl.load(x_ptr + i) + 1)


class TestSharedMemory:
    """A program loads its whole block before it stores, also where the two share memory."""

    def expected(self, x):
        return torch.cat([x[:1], x[:64] + 1])

    def test_one_tensor_twice(self):
        x = torch.randn(65)
        expected = self.expected(x)
        triton_cpu.launch(shift_kernel, (1,))(x, x, BLOCK=64)
        assert torch.equal(x, expected)

    def test_two_views(self):
        x = torch.randn(66)
        expected = x[:64] + 1
        triton_cpu.launch(copy_plus_one_kernel, (1,))(x[:64], x[1:65], BLOCK=64)
        assert torch.equal(x[1:65], expected)

    def test_two_storages_of_one_buffer(self):
        buffer = np.random.default_rng(0).standard_normal(65).astype(np.float32)
        a, b = torch.from_numpy(buffer), torch.from_numpy(buffer[1:])
        expected = self.expected(a)[1:]
        triton_cpu.launch(copy_plus_one_kernel, (1,))(a, b, BLOCK=64)
        assert torch.equal(b, expected)

    def test_wrapped_tensor_and_its_base(self):
        x = torch.randint(0, 100, (65,), dtype=torch.int32)
        expected = self.expected(x)
        triton_cpu.launch(shift_kernel, (1,))(triton.reinterpret(x, tl.int32), x, BLOCK=64)
        assert torch.equal(x, expected)

    def test_active_driver_takes_the_same_care(self, installed):
        x = torch.randn(65)
        expected = self.expected(x)
        shift_kernel[(1,)](x, x, BLOCK=64)
        assert torch.equal(x, expected)

    def test_only_then_a_second_kernel_is_compiled(self, monkeypatch):
        compiled = []
        real = launcher.Launcher._compile_cautious
        monkeypatch.setattr(
            launcher.Launcher,
            "_compile_cautious",
            lambda self: compiled.append(self.name) or real(self),
        )
        x, out = torch.randn(80), torch.empty(80)
        triton_cpu.launch(copy_plus_one_kernel, (1,))(x, out, BLOCK=16)
        assert compiled == []
        for _ in range(2):
            triton_cpu.launch(copy_plus_one_kernel, (1,))(x, x, BLOCK=16)
        assert compiled == ["copy_plus_one_kernel"]


@triton.jit
def copy_plus_one_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def assert_kernel(x_ptr, n):
    value = tl.load(x_ptr + tl.program_id(0))
    tl.device_assert(value < n, "value out of range")


class TestDeviceAssert:
    def test_raises_with_its_text(self):
        x = torch.tensor([1, 2, 30, 4])
        with pytest.raises(AssertionError, match="value out of range"):
            triton_cpu.launch(assert_kernel, (4,))(x, 10, debug=True)
        x[2] = 3
        triton_cpu.launch(assert_kernel, (4,))(x, 10, debug=True)

    def test_belongs_to_the_launch_of_its_thread(self):
        good, bad = torch.zeros(256, dtype=torch.int64), torch.full((256,), 99)
        raised = {"good": 0, "bad": 0}

        def is_refused(x):
            try:
                triton_cpu.launch(assert_kernel, (256,))(x, 10, debug=True)
            except AssertionError:
                return True
            return False

        def work(name, x):
            raised[name] = sum(is_refused(x) for _ in range(300))

        assert not is_refused(good)  # compiled once, for both
        workers = [
            threading.Thread(target=work, args=(name, x))
            for name, x in (("good", good), ("bad", bad))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert raised == {"good": 0, "bad": 300}

    def test_is_left_out_without_debug(self):
        triton_cpu.launch(assert_kernel, (1,))(torch.tensor([30]), 10)

    def test_launch_decides_before_the_decorator_and_the_environment_before_both(self, monkeypatch):
        decorated = triton.jit(assert_kernel.fn, debug=True)
        bad = torch.tensor([30])
        with pytest.raises(AssertionError):
            triton_cpu.launch(decorated, (1,))(bad, 10)
        triton_cpu.launch(decorated, (1,))(bad, 10, debug=False)
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
        with pytest.raises(AssertionError):
            triton_cpu.launch(decorated, (1,))(bad, 10, debug=False)


CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps) for block in (16, 64) for warps in (1, 4)
]


@triton.autotune(configs=CONFIGS, key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(out_ptr + i, tl.load(x_ptr + i) * 2)
    else:
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)


def tuned_grid(arguments):
    return (triton.cdiv(arguments["n"], arguments["BLOCK"]),)


class TestTuning:
    def test_beside_another_driver_keeps_its_results_to_itself(self):
        tuned_kernel.cache.clear()
        for n in (128, 130):
            x, out = torch.randn(n), torch.zeros(n)
            triton_cpu.launch(tuned_kernel, tuned_grid)(x, out, n)
            assert torch.equal(out, x * 2)
        assert not tuned_kernel.cache
        shadow = prepared(tuned_kernel)
        assert len(shadow.cache) == 2
        assert shadow.best_config in CONFIGS

    def test_with_the_cpu_as_active_driver(self, installed):
        tuned_kernel.cache.clear()
        x, out = torch.randn(130), torch.zeros(130)
        tuned_kernel[tuned_grid](x, out, 130)
        assert torch.equal(out, x * 2)
        assert len(tuned_kernel.cache) == 1

    def test_resets_what_it_was_told_to(self):
        x, total = torch.ones(64), torch.zeros(1)
        triton_cpu.launch(sum_kernel, (1,))(x, total, 64)
        assert total.item() == 64

    def test_benchmark_returns_quantiles_in_milliseconds(self):
        times = driver.benchmark(lambda: time.sleep(0.002), quantiles=(0.5, 0.2, 0.8))
        assert len(times) == 3
        assert all(2 <= t < 1000 for t in times)
        assert driver.benchmark(lambda: None) < 2


@triton.autotune(configs=CONFIGS, key=["n"], reset_to_zero=["total_ptr"])
@triton.jit
def sum_kernel(x_ptr, total_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK))
        tl.atomic_add(total_ptr, tl.sum(x))


@triton.jit
def meet_kernel(count_ptr, met_ptr, patience):
    """Count the programs that saw both programs running."""
    tl.atomic_add(count_ptr, 1)
    waited = 0
    count = tl.atomic_add(count_ptr, 0)
    while (count < 2) & (waited < patience):
        waited += 1
        count = tl.atomic_add(count_ptr, 0)
    if count == 2 and waited < patience:
        tl.atomic_add(met_ptr, 1)


class TestThreads:
    def meet(self, patience):
        count, met = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        triton_cpu.launch(meet_kernel, (2,))(count, met, patience)
        return met.item()

    def test_programs_run_side_by_side(self, threads):
        threads(2)
        assert self.meet(2**30) == 2

    def test_torch_says_how_many(self, threads):
        threads(1)
        assert self.meet(100_000) == 1  # the second program finds that the first has counted

    def test_are_those_of_torch(self):
        add_ones()
        with open("/proc/self/maps") as maps:
            mapped = {Path(line.split()[-1]) for line in maps if ".so" in line}
        (library,) = [path for path in mapped if re.match(r"lib(g|i)?omp", path.name)]
        assert library.is_relative_to(Path(torch.__file__).parent)

    def test_other_threads_of_python_run_meanwhile(self):
        """The kernel waits for what only another thread of Python can do."""
        flag = torch.zeros(1, dtype=torch.int32)
        seen = torch.zeros(1, dtype=torch.int32)
        timer = threading.Timer(0.1, lambda: flag.fill_(1))
        triton_cpu.warmup(wait_kernel, flag, seen, 2**40, grid=(1,))
        timer.start()
        triton_cpu.launch(wait_kernel, (1,))(flag, seen, 2**40)
        timer.join()
        assert seen.item() == 1

    def test_one_kernel_from_several_threads(self):
        results, errors = {}, []

        def work(number):
            try:
                x, y = torch.full((1000,), float(number)), torch.arange(1000.0)
                for _ in range(20):
                    out = torch.empty(1000)
                    triton_cpu.launch(fresh, (4,))(x, y, out, 1000, BLOCK=256)
                    results.setdefault(number, []).append(torch.equal(out, x + y))
            except Exception as error:
                errors.append(error)

        fresh = triton.jit(add_kernel.fn)  # nobody has compiled it
        workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors
        assert all(all(results[number]) for number in range(4))


@triton.jit
def wait_kernel(flag_ptr, seen_ptr, patience):
    waited = tl.full((), 0, tl.int64)
    flag = tl.atomic_add(flag_ptr, 0)
    while (flag == 0) & (waited < patience):
        waited += 1
        flag = tl.atomic_add(flag_ptr, 0)
    tl.store(seen_ptr, flag)


def add_ones():
    out = torch.empty(64)
    triton_cpu.launch(add_kernel, (2,))(torch.ones(64), torch.ones(64), out, 64, BLOCK=32)
    return bool((out == 2).all())


def _in_child(queue):
    torch.set_num_threads(1)
    queue.put(add_ones())


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_forked_process_runs_kernels_on_one_thread():
    """With more threads OpenMP is not to be used after a fork, by torch neither."""
    assert add_ones()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get()


def test_warmup_compiles_and_does_not_run():
    out = torch.full((8,), -1.0)
    fresh = triton.jit(add_kernel.fn)
    kernel = triton_cpu.warmup(fresh, torch.ones(8), torch.ones(8), out, 8, BLOCK=8)
    assert (out == -1).all()
    assert "tcpu_launch" in kernel.asm["cpp"]
    by_type = triton_cpu.warmup(fresh, *[torch.float32] * 3, 8, BLOCK=8)
    assert by_type.hash == kernel.hash


def test_interpreted_kernels_run_as_they_are(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = triton.jit(add_kernel.fn)
    monkeypatch.delenv("TRITON_INTERPRET")
    x, out = torch.randn(8), torch.empty(8)
    triton_cpu.launch(interpreted, (1,))(x, x, out, 8, BLOCK=8)
    assert torch.equal(out, x + x)


ARENA = """
#include "tcpu.h"
#include "program.h"
extern "C" int touch() {
  return tcpu::run_grid<(64 << 20), false>(1, 1, 1, 1, [](char* arena, int, int, int) {
    for (long at = 0; at < 64 << 20; at += 4096) arena[at] = 1;
  });
}
"""


def test_a_thread_that_ends_gives_its_memory_back():
    library = build.load(build.build(ARENA, "touch"))

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    for _ in range(6):
        thread = threading.Thread(target=library.touch)
        thread.start()
        thread.join()
    assert resident() - before < 2 * (64 << 20)
