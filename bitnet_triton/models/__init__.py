"""Hugging Face models with ternary linears, and the three ways to get one."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bitnet_triton.models.bitnet import BitNetConfig, BitNetForCausalLM, BitNetModel
from bitnet_triton.models.switch import disable, enable
from bitnet_triton.models.swap import use_ternary_kernels

# Names only: nothing that transformers already knows changes
AutoConfig.register(BitNetConfig.model_type, BitNetConfig)
AutoModel.register(BitNetConfig, BitNetModel)
AutoModelForCausalLM.register(BitNetConfig, BitNetForCausalLM)

__all__ = [
    "BitNetConfig",
    "BitNetForCausalLM",
    "BitNetModel",
    "disable",
    "enable",
    "use_ternary_kernels",
]
