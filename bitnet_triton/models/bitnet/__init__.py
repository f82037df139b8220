from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.bitnet.global_attention import add_global_projections
from bitnet_triton.models.bitnet.modeling_bitnet import BitNetForCausalLM, BitNetModel

__all__ = ["BitNetConfig", "BitNetForCausalLM", "BitNetModel", "add_global_projections"]
