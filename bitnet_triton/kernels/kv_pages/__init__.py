import bitnet_triton.kernels.kv_pages.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.kv_pages.op import copy_pages, write_pages

__all__ = ["copy_pages", "write_pages"]
