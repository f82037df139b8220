"""What differs between versions of Triton."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import compat

TEXT = """#loc = loc("k.py":1:0)
"builtin.module"() ({
  "tt.func"() <{function_type = (i32) -> i32, sym_name = "helper", sym_visibility = "private"}> ({
  }) {noinline = true} : () -> () loc(#loc)
  "tt.func"() <{arg_attrs = [{tt.divisibility = 16 : i32}, {}, {}], function_type = (!tt.ptr<f32>, \
tensor<4x!tt.ptr<i8>>, i1) -> (), sym_name = "k", sym_visibility = "public"}> ({
  }) {noinline = false} : () -> () loc(#loc)
}) : () -> () loc(#loc)
"""


def test_argument_types_are_those_of_the_public_function():
    assert compat.argument_types(TEXT) == ["!tt.ptr<f32>", "tensor<4x!tt.ptr<i8>>", "i1"]


def test_function_without_arguments_has_no_types():
    text = '"tt.func"() <{function_type = () -> (), sym_visibility = "public"}> ({'
    assert compat.argument_types(text) == []


@triton.jit
def located_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def test_generic_text_names_the_source_line(monkeypatch):
    seen = []
    real = compat.generic_text
    monkeypatch.setattr(compat, "generic_text", lambda module: seen.append(real(module)) or seen[0])
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    triton_cpu.warmup(located_kernel, torch.float32)
    line = located_kernel.starting_line_number + 2
    assert f'{__file__}":{line}:' in seen[0]
    assert '"tt.store"(' in seen[0]


@pytest.mark.parametrize(
    ("installed", "objection"),
    [
        (None, "Triton is not installed"),
        ("3.5.1", r"Triton 3\.5\.1 is too old, 3\.6 is the oldest that works"),
        ("3.6.0", None),
        ("3.9.0+git1234", None),
        ("4.0.0", None),
    ],
)
def test_supported_versions(monkeypatch, installed, objection):
    monkeypatch.setattr(compat, "version", lambda: installed)
    found = compat.supported()
    assert found is None if objection is None else re.match(objection, found)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_refused(monkeypatch, platform):
    monkeypatch.setattr(compat.sys, "platform", platform)
    assert compat.supported() == f"Triton kernels run on the CPU under Linux, not under {platform}"


def test_package_imports_without_the_modules_of_linux():
    """Others import it to hear the objection."""
    code = """
import sys
sys.modules.update(fcntl=None, grp=None, pwd=None)
import bitnet_triton.triton_cpu as triton_cpu
sys.platform = "win32"
assert "Linux" in triton_cpu.objection()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("installed", "tested"), [("3.6.0", True), ("3.9.1", True), ("3.10.0", False)]
)
def test_tested_versions(monkeypatch, installed, tested):
    monkeypatch.setattr(compat, "version", lambda: installed)
    assert compat.tested() == tested


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "3.99.0")
    triton_cpu.objection.cache_clear()
    yield
    triton_cpu.objection.cache_clear()


def test_untested_version_runs_a_kernel_first(untested, monkeypatch):
    assert triton_cpu.objection() is None
    triton_cpu.objection.cache_clear()
    monkeypatch.setattr(
        "bitnet_triton.triton_cpu.self_test.run", lambda: exec("raise RuntimeError('wrong sum')")
    )
    assert "3.99.0 is newer than what was tested" in triton_cpu.objection()
    assert "wrong sum" in triton_cpu.objection.__wrapped__()


@triton.jit
def block_kernel(descriptor, out_ptr, row, column, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tl.store(out_ptr + i[:, None] * N + j, descriptor.load([row, column]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_host_descriptors_are_passed_as_this_version_wants_them(dtype):
    x = torch.arange(24 * 48).remainder(100).view(24, 48).to(dtype)
    out = torch.empty(8, 16, dtype=dtype)
    descriptor = TensorDescriptor.from_tensor(x, [8, 16])
    triton_cpu.launch(block_kernel, (1,))(descriptor, out, 8, 16, M=8, N=16)
    assert torch.equal(out, x[8:16, 16:32])
    triton_cpu.launch(block_kernel, (1,))(descriptor, out, 20, 40, M=8, N=16)  # over the edges
    expected = torch.zeros(8, 16, dtype=dtype)
    expected[:4, :8] = x[20:, 40:]
    assert torch.equal(out, expected)
