import bitnet_triton.kernels.linear_attention.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
