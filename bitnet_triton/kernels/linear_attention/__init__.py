from bitnet_triton.kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
