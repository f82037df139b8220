from bitnet_triton.kernels.dense_linear.op import dense_linear

__all__ = ["dense_linear"]
