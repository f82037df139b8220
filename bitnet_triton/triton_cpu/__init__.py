"""Triton on a CPU: compiles the kernels of the stock ``triton`` wheel to C++ and runs them.

    import bitnet_triton.triton_cpu as triton_cpu

    triton_cpu.launch(kernel, grid)(x, y, n, BLOCK=1024)   # beside whatever driver is active
    triton_cpu.install()                                   # or: kernel[grid](...) on CPU tensors

docs/triton-cpu.md tells what it needs, and where it keeps what it compiled.
"""

from bitnet_triton.triton_cpu.errors import (
    CacheError,
    CompilerError,
    ToolchainError,
    UnsupportedOperation,
)
from bitnet_triton.triton_cpu.interface import (
    Report,
    capture,
    install,
    launch,
    objection,
    real_triton_cpu,
    report,
    uninstall,
    warmup,
)

__all__ = [
    "CacheError",
    "CompilerError",
    "Report",
    "ToolchainError",
    "UnsupportedOperation",
    "capture",
    "install",
    "launch",
    "objection",
    "real_triton_cpu",
    "report",
    "uninstall",
    "warmup",
]
