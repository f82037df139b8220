import bitnet_triton.kernels.rms_norm.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.rms_norm.op import rms_norm
from bitnet_triton.kernels.rms_norm.quantized import (
    relu2_mul_norm_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)

__all__ = ["relu2_mul_norm_quantize", "rms_norm", "rms_norm_quantize", "silu_mul_quantize"]
