from bitnet_triton.kernels.rms_norm.op import relu2_mul_norm_quantize, rms_norm, rms_norm_quantize

__all__ = ["relu2_mul_norm_quantize", "rms_norm", "rms_norm_quantize"]
