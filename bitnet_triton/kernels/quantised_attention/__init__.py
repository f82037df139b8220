import bitnet_triton.kernels.quantised_attention.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.quantised_attention.codes import KeyValueCodes
from bitnet_triton.kernels.quantised_attention.op import quantised_attention

__all__ = ["KeyValueCodes", "quantised_attention"]
