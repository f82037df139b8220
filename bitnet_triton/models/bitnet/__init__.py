from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.bitnet.modeling_bitnet import BitNetForCausalLM, BitNetModel

__all__ = ["BitNetConfig", "BitNetForCausalLM", "BitNetModel"]
