from bitnet_triton.models.bitnet.attention import (
    add_global_projections,
    set_attention,
    set_cache,
)
from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.bitnet.modeling_bitnet import BitNetForCausalLM, BitNetModel

__all__ = [
    "BitNetConfig",
    "BitNetForCausalLM",
    "BitNetModel",
    "add_global_projections",
    "set_attention",
    "set_cache",
]
