import bitnet_triton.kernels.selected_blocks.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.selected_blocks.op import selected_block_attention

__all__ = ["selected_block_attention"]
