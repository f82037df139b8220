import bitnet_triton.kernels.bit_linear.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.bit_linear.op import bit_linear

__all__ = ["bit_linear"]
