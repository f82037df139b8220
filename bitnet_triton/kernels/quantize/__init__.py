import bitnet_triton.kernels.quantize.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.quantize.op import quantize_activations, quantize_weight

__all__ = ["quantize_activations", "quantize_weight"]
