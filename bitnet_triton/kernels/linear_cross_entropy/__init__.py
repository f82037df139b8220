import bitnet_triton.kernels.linear_cross_entropy.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
