"""What can go wrong between a kernel and its machine code."""

from bitnet_triton.triton_cpu.ir import UnsupportedOperation

__all__ = ["CacheError", "CompilerError", "ToolchainError", "UnsupportedOperation"]


class ToolchainError(RuntimeError):
    """There is no C++ compiler that works; the message says what was tried."""


class CompilerError(RuntimeError):
    """The C++ compiler refused a kernel; the message holds its words."""


class CacheError(RuntimeError):
    """The cache directory cannot be used, or holds something that another user may have written."""
