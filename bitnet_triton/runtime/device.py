"""What the device at hand can do: one function a backend, each says why it cannot run."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from bitnet_triton import triton_cpu

# torch.is_autocast_enabled raises for the others, "meta" for instance
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@functools.cache
def triton_version() -> str | None:
    """Return the version of the installed Triton, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")


@functools.cache
def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile uses on a CPU, or None."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


@functools.cache
def has_python_headers() -> bool:
    """Tell whether the C headers of Python are installed, which torch.compile includes."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def is_interpreted() -> bool:
    """Tell whether the user set TRITON_INTERPRET=1, to debug kernels."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_objection(device: torch.device) -> str | None:
    """Say why Triton kernels cannot run on tensors of ``device``; None when they can."""
    if triton_version() is None:
        return "Triton is not installed"
    if device.type in ("cuda", "xpu"):
        return None
    if is_interpreted():
        return None
    if device.type == "cpu":
        return triton_cpu.objection()
    return f"Triton compiles for GPUs and CPUs, the tensors are on `{device.type}`"


def real_triton_cpu_objection(device: torch.device) -> str | None:
    """Say why the separate project triton-cpu cannot run kernels on tensors of ``device``."""
    if device.type != "cpu":
        return f"triton-cpu runs on CPUs, the tensors are on `{device.type}`"
    return None if triton_cpu.real_triton_cpu() else "triton-cpu is not installed"


def compile_objection(device: torch.device) -> str | None:
    """Say why torch.compile cannot run on tensors of ``device``; None when it can."""
    if device.type == "cpu":
        if not cpp_compiler():
            return "torch.compile needs a C++ compiler (g++ or clang++)"
        if not has_python_headers():
            return "torch.compile needs the C headers of Python (python3-dev, python3-devel)"
        return None
    if device.type in ("cuda", "xpu"):
        return None if triton_version() else "torch.compile needs Triton on a GPU"
    return f"torch.compile is not supported on `{device.type}`"


def smallest_dot(device: torch.device) -> int:
    """Return the fewest rows that ``tl.dot`` multiplies in a kernel on ``device``."""
    return 1 if device.type == "cpu" else 16


def cpu_capability() -> str:
    """Name the widest vector instructions that PyTorch uses on this CPU."""
    return torch.backends.cpu.get_cpu_capability()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that torch.autocast asks for on ``device_type``; None outside of it."""
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
