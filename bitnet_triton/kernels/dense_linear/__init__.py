import bitnet_triton.kernels.dense_linear.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.dense_linear.op import dense_linear, dense_linear_topk

__all__ = ["dense_linear", "dense_linear_topk"]
