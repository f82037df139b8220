import bitnet_triton.kernels.flash_attention.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.merge import merge_attention
from bitnet_triton.kernels.flash_attention.op import flash_attention

__all__ = ["Mask", "flash_attention", "merge_attention"]
