"""Which blocks of keys a token reads: those of the best scores, by units of keys."""

import bitnet_triton.kernels.top_blocks.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.top_blocks.op import top_blocks
from bitnet_triton.kernels.top_blocks.pool_op import pool_keys, pool_last_keys
from bitnet_triton.kernels.top_blocks.units import Units

__all__ = ["Units", "pool_keys", "pool_last_keys", "top_blocks"]
