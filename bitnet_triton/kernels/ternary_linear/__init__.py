import bitnet_triton.kernels.ternary_linear.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.ternary_linear.merged import MergedTernaryWeight
from bitnet_triton.kernels.ternary_linear.op import ternary_linear
from bitnet_triton.kernels.ternary_linear.quantized import ternary_linear_quantized

__all__ = ["MergedTernaryWeight", "ternary_linear", "ternary_linear_quantized"]
