"""Assertions, printing and hints: what a kernel says to the reader and to the compiler."""

import os
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
    assert "ff" in out.lower()
    assert "100" in out  # 256 in hexadecimal


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
