"""Native Sparse Attention: compressed blocks, chosen blocks and a window, summed by gates."""

import bitnet_triton.kernels.native_sparse.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks
from bitnet_triton.kernels.native_sparse.op import (
    compress_blocks,
    native_sparse_attention,
    select_blocks,
)

__all__ = ["SparseBlocks", "compress_blocks", "native_sparse_attention", "select_blocks"]
