"""Assertions, printing and hints: what a kernel says to the reader and to the compiler."""

import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def hints_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    tl.assume(n >= 0)
    n = tl.multiple_of(n, 8)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.max_contiguous(tl.multiple_of(i, BLOCK), BLOCK)
    half = tl.max_constancy(i // 2, 2)
    tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(x_ptr + half, mask=i < n, other=0.0), mask=i < n)


@pytest.mark.ops("assume", "multiple_of", "max_contiguous", "max_constancy", "debug_barrier")
def test_hints_change_nothing(run, check):
    x, y = torch.randn(64), torch.zeros(64)
    run(hints_kernel, (4,))(x, y, 40, BLOCK=16)
    check(y, torch.cat([x[torch.arange(40) // 2], torch.zeros(24)]))


@triton.jit
def static_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK % 16 == 0, "BLOCK has to be a multiple of 16")
    tl.static_print("BLOCK is", BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), BLOCK)


@pytest.mark.ops("static_assert", "static_print")
def test_constants_are_asserted_and_printed(run, check):
    y = torch.empty(32).int()
    run(static_kernel, (1,))(y, BLOCK=32)
    check(y, torch.full((32,), 32))


@pytest.mark.ops("static_assert")
@pytest.mark.no_interpreter("it raises an error of its own")
def test_a_wrong_constant_stops_the_compiler(run):
    with pytest.raises(triton.CompilationError, match="multiple of 16"):
        run(static_kernel, (1,))(torch.empty(8).int(), BLOCK=8)


@triton.jit
def asserted_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.device_assert(x >= 0, "x has to be positive", mask=i < n)
    assert n > 0, "n has to be positive"
    tl.store(y_ptr + i, x + 1)


@pytest.mark.ops("device_assert")
def test_what_is_asserted_holds(run, check):
    x, y = torch.tensor([1, 2, 3, -4]).int(), torch.zeros(4).int()
    run(asserted_kernel, (1,))(x, y, 3, BLOCK=4, debug=True)
    check(y, x + 1)


@pytest.mark.ops("device_assert")
@pytest.mark.no_interpreter("it raises an error of its own")
def test_an_assertion_that_fails_raises(run):
    x, y = torch.tensor([1, 2, 3, -4]).int(), torch.zeros(4).int()
    with pytest.raises((AssertionError, RuntimeError), match="x has to be positive"):
        run(asserted_kernel, (1,))(x, y, 4, BLOCK=4, debug=True)


@pytest.mark.ops("device_assert")
@pytest.mark.no_interpreter("it asserts always")
def test_nothing_is_asserted_outside_of_debugging(run, check):
    x, y = torch.tensor([1, 2, 3, -4]).int(), torch.zeros(4).int()
    run(asserted_kernel, (1,))(x, y, 4, BLOCK=4)
    check(y, x + 1)


@triton.jit
def overflowing_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) + tl.load(x_ptr + 1))


@pytest.mark.ops("device_assert")
@pytest.mark.no_interpreter("it does not look for overflow")
def test_debugging_finds_integers_that_overflow(run, check):
    y = torch.zeros(1).int()
    big = torch.tensor([2**31 - 1, 1]).int()
    run(overflowing_kernel, (1,))(big, y)
    check(y, torch.tensor([-(2**31)]))
    run(overflowing_kernel, (1,))(torch.tensor([5, 1]).int(), y, debug=True, sanitize_overflow=True)
    check(y, torch.tensor([6]))
    with pytest.raises((AssertionError, RuntimeError), match="overflow"):
        run(overflowing_kernel, (1,))(big, y, debug=True, sanitize_overflow=True)


@triton.jit
def limited(a, b):
    tl.device_assert(a + b < 1000, "the sum is too large")
    return a + b


@triton.jit
def limited_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    total = tl.reduce(x, AXIS, limited)
    tl.store(y_ptr + tl.arange(0, total.shape[0]), total)


@triton.jit
def limited_scan_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + place, tl.associative_scan(tl.load(x_ptr + place), AXIS, limited))


@pytest.mark.ops("device_assert", "reduce", "associative_scan")
@pytest.mark.no_interpreter("it raises an error of its own, and asserts always")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kernel", [limited_kernel, limited_scan_kernel], ids=["reduce", "scan"])
def test_combining_functions_assert(run, check, kernel, axis):
    x = torch.randint(0, 9, (8, 32)).int()
    scan = kernel is limited_scan_kernel
    y = torch.full(x.shape if scan else (x.shape[1 - axis],), -1).int()
    expected = x.cumsum(axis) if scan else x.sum(axis)
    run(kernel, (1,))(x, y, M=8, N=32, AXIS=axis, debug=True)
    check(y, expected)
    x[5, 20] = 999
    x[4, 20] = x[5, 19] = 1
    with pytest.raises((AssertionError, RuntimeError), match="the sum is too large"):
        run(kernel, (1,))(x, y, M=8, N=32, AXIS=axis, debug=True)
    check(y, expected)  # nothing is stored after it
    run(kernel, (1,))(x, y, M=8, N=32, AXIS=axis)
    check(y, x.cumsum(axis) if scan else x.sum(axis))


@triton.jit
def totals_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1)
    tl.store(y_ptr, tl.sum(x))
    tl.store(z_ptr + i, tl.cumsum(x))


@triton.jit
def product_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z_ptr + i, tl.cumprod(tl.load(x_ptr + i, mask=i < n, other=1)))


@pytest.mark.ops("sum", "cumsum", "cumprod", "device_assert")
@pytest.mark.no_interpreter("it does not look for overflow")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_sums_that_overflow_assert_in_debugging(run, check, dtype):
    x = torch.randint(0, 3, (64,)).to(dtype)
    y, z = torch.empty(1).int(), torch.empty(64).int()
    run(totals_kernel, (1,))(x, y, z, 64, BLOCK=64, debug=True)
    check(y[0], x.sum())
    check(z, x.cumsum(0))
    large = torch.full((64,), 2**26, dtype=torch.int32)
    with pytest.raises((AssertionError, RuntimeError), match=r"int32 overflow detected.*add"):
        run(totals_kernel, (1,))(large, y, z, 64, BLOCK=64, debug=True)
    run(totals_kernel, (1,))(large, y, z, 20, BLOCK=64, debug=True)
    check(y[0], torch.tensor(20 * 2**26 + 44))
    with pytest.raises((AssertionError, RuntimeError), match=r"int32 overflow detected.*mul"):
        run(product_kernel, (1,))(torch.full((64,), 2).int(), y, z, 32, BLOCK=64, debug=True)
    run(product_kernel, (1,))(torch.full((64,), 2).int(), y, z, 30, BLOCK=64, debug=True)
    check(z[-1], torch.tensor(2**30))


PRINTING = """
import sys
import torch, triton
import triton.language as tl
import bitnet_triton.triton_cpu as triton_cpu

@triton.jit
def printing_kernel(x_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_print("sum", tl.sum(x), n)
    tl.device_print("x =", x)
    tl.device_print("bits", pid + 255, hex=True)
    print("plain", pid)
    tl.device_print("address", x_ptr)
    i = tl.arange(0, 16)
    tl.device_print("wide", i + 0.5)
    tl.device_print("square", tl.reshape(i * i, (2, 8))[:, None, :])

triton_cpu.launch(printing_kernel, (2,))(torch.tensor([1.5, -2.0, 30.0, 0.25]), 7, BLOCK=4)
"""


@pytest.mark.ops("device_print")
def test_values_are_printed(tmp_path, request):
    script = tmp_path / "printing.py"
    script.write_text(PRINTING)
    paths = [str(request.config.rootpath), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    out = result.stdout + result.stderr
    for program in (0, 1):
        assert f"({program}, 0, 0)" in out, out
    for text in ("sum", "29.75", "7", "x =", "1.5", "-2", "30", "0.25", "bits", "plain"):
        assert text in out, f"{text!r} is not in {out}"
    assert "0x000000ff" in out
    assert "0x00000100" in out
    lines = out.splitlines()
    # as TritonGPU prints: the operand where there are several, indices as wide as the largest
    assert "pid (1, 0, 0) idx () sum: (operand 0) 29.750000" in lines
    assert "pid (1, 0, 0) idx () sum: (operand 1) 7" in lines
    assert "pid (0, 0, 0) idx (2) x =: 30.000000" in lines
    assert "pid (0, 0, 0) idx (1, 0, 3) square: 121" in lines
    assert len([x for x in lines if re.fullmatch(r"pid .* idx \(\) address: 0x[0-9a-f]+", x)]) == 2
    wide = [x for x in lines if "wide" in x]
    assert wide[:2] == [f"pid (0, 0, 0) idx ( {n}) wide: {n}.500000" for n in range(2)]
    assert wide[10] == "pid (0, 0, 0) idx (10) wide: 10.500000"


@triton.jit
def underflow_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.expect_zero(x, i >= 4))


@pytest.mark.ops("expect_zero")
@pytest.mark.no_interpreter("it reads no options")
@pytest.mark.skipif(not hasattr(tl, "expect_zero"), reason="new in Triton 3.8")
def test_expected_zeros_are_asserted_in_debugging(run, check):
    x, y = torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 5]), torch.empty(8)
    run(underflow_kernel, (1,))(x, y, BLOCK=8)
    check(y, x)
    with pytest.raises((AssertionError, RuntimeError), match="expect_zero"):
        run(underflow_kernel, (1,))(x, y, BLOCK=8, debug=True)


@triton.jit
def assembly_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("abs.s32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)
    tl.store(y_ptr + i, y)


@pytest.mark.refused("inline_asm_elementwise", "assembly of a GPU")
def test_assembly_of_a_gpu_is_refused_by_name(run):
    with pytest.raises(NotImplementedError, match="inline_asm") as error:
        run(assembly_kernel, (1,))(torch.ones(16).int(), torch.ones(16).int(), BLOCK=16)
    assert "test_language_debug.py" in str(error.value)  # the line of the source
