import bitnet_triton.kernels.lsh_attention.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.lsh_attention.buckets import hash_buckets
from bitnet_triton.kernels.lsh_attention.op import bucket_attention, lsh_attention

__all__ = ["bucket_attention", "hash_buckets", "lsh_attention"]
