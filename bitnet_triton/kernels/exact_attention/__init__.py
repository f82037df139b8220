import bitnet_triton.kernels.exact_attention.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.exact_attention.op import exact_attention

__all__ = ["exact_attention"]
