"""Triton IR to C++."""

from bitnet_triton.triton_cpu.emit.kernel import Emitted, emit_kernel
from bitnet_triton.triton_cpu.ir import UnsupportedOperation

__all__ = ["Emitted", "UnsupportedOperation", "emit_kernel"]
