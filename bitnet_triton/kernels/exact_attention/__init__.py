from bitnet_triton.kernels.exact_attention.op import exact_attention

__all__ = ["exact_attention"]
