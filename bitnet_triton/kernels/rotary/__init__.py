import bitnet_triton.kernels.rotary.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.rotary.angles import rotary_angles
from bitnet_triton.kernels.rotary.op import apply_rotary, rotary_and_store

__all__ = ["apply_rotary", "rotary_and_store", "rotary_angles"]
