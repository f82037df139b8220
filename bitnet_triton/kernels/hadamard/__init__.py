import bitnet_triton.kernels.hadamard.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.hadamard.op import hadamard

__all__ = ["hadamard"]
