from bitnet_triton.kernels.ternary_linear.op import bit_linear, ternary_linear

__all__ = ["bit_linear", "ternary_linear"]
