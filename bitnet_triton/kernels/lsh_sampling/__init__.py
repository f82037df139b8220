import bitnet_triton.kernels.lsh_sampling.tile_sizes  # noqa: F401  registers them
from bitnet_triton.kernels.lsh_sampling.op import lsh_sampling_attention
from bitnet_triton.kernels.lsh_sampling.signs import SignCodes
from bitnet_triton.kernels.lsh_sampling.tables import HashTables
from bitnet_triton.kernels.lsh_sampling.verified import verified_sampling_attention

__all__ = ["HashTables", "SignCodes", "lsh_sampling_attention", "verified_sampling_attention"]
