"""What a device can do, with the reason where it cannot."""

import pytest
import torch

from bitnet_triton.runtime import device
from bitnet_triton.runtime.device import autocast_dtype, compile_objection, triton_objection

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture
def _no_triton(monkeypatch):
    monkeypatch.setattr(device, "triton_version", lambda: None)


def test_triton_runs_on_gpus_and_where_there_is_a_compiler_on_the_cpu(monkeypatch):
    assert triton_objection(CUDA) is None
    monkeypatch.setattr(device.triton_cpu, "objection", lambda: None)
    assert triton_objection(CPU) is None
    monkeypatch.setattr(device.triton_cpu, "objection", lambda: "no compiler")
    assert triton_objection(CPU) == "no compiler"
    assert triton_objection(META) == (
        "Triton compiles for GPUs and CPUs, the tensors are on `meta`"
    )


def test_the_interpreter_runs_on_any_device(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(device.triton_cpu, "objection", lambda: "no compiler")
    assert triton_objection(CPU) is None


@pytest.mark.usefixtures("_no_triton")
def test_triton_may_be_missing():
    assert triton_objection(CUDA) == "Triton is not installed"
    assert triton_objection(CPU) == "Triton is not installed"
    assert compile_objection(CUDA) == "torch.compile needs Triton on a GPU"


def test_torch_compile_needs_a_compiler_on_a_cpu(monkeypatch):
    monkeypatch.setattr(device, "cpp_compiler", lambda: "/bin/c++")
    assert compile_objection(CPU) is None
    monkeypatch.setattr(device, "cpp_compiler", lambda: None)
    assert compile_objection(CPU) == "torch.compile needs a C++ compiler (g++ or clang++)"


def test_torch_compile_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(device.sysconfig, "get_path", lambda _: str(tmp_path))
    assert not device.has_python_headers.__wrapped__()
    (tmp_path / "Python.h").touch()
    assert device.has_python_headers.__wrapped__()

    monkeypatch.setattr(device, "has_python_headers", lambda: False)
    assert compile_objection(CPU) == (
        "torch.compile needs the C headers of Python (python3-dev, python3-devel)"
    )


def test_torch_compile_does_not_run_everywhere():
    assert compile_objection(META) == "torch.compile is not supported on `meta`"


def test_the_compiler_of_the_environment_comes_first(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert device.cpp_compiler.__wrapped__() == str(compiler)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert device.cpp_compiler.__wrapped__() is None


def test_the_dtype_of_autocast_is_known_inside_of_it_only():
    assert autocast_dtype("cpu") is None
    with torch.autocast("cpu", torch.float16):
        assert autocast_dtype("cpu") == torch.float16
        assert autocast_dtype("cuda") is None
        assert autocast_dtype("meta") is None
