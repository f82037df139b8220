import bitnet_triton.kernels.attention_mass.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.attention_mass.op import attention_mass

__all__ = ["attention_mass"]
