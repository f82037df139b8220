import bitnet_triton.kernels.int8_linear.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.int8_linear.op import int8_linear, int8_linear_topk
from bitnet_triton.kernels.int8_linear.weight import Int8Weight

__all__ = ["Int8Weight", "int8_linear", "int8_linear_topk"]
