"""Hugging Face models with ternary linears, and the three ways to get one."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bitnet_triton.models.adapters import AdapterMerge, merge_adapters
from bitnet_triton.models.bitnet import (
    BitNetConfig,
    BitNetForCausalLM,
    BitNetModel,
    add_global_projections,
    set_attention,
    set_cache,
)
from bitnet_triton.models.extend import extend_context
from bitnet_triton.models.fuse import fuse, unfuse
from bitnet_triton.models.prefix_cache import PrefixCache
from bitnet_triton.models.saved_cache import load_cache, save_cache
from bitnet_triton.models.swap import use_ternary_kernels
from bitnet_triton.models.switch import disable, enable

# Names only, as in attention/hub: nothing that transformers already knows changes. exist_ok:
# transformers looks first at the name of the class, which its own config has too, and takes ours
# for a second registration
AutoConfig.register(BitNetConfig.model_type, BitNetConfig, exist_ok=True)
AutoModel.register(BitNetConfig, BitNetModel, exist_ok=True)
AutoModelForCausalLM.register(BitNetConfig, BitNetForCausalLM, exist_ok=True)

__all__ = [
    "AdapterMerge",
    "BitNetConfig",
    "BitNetForCausalLM",
    "BitNetModel",
    "PrefixCache",
    "add_global_projections",
    "disable",
    "enable",
    "extend_context",
    "fuse",
    "load_cache",
    "merge_adapters",
    "save_cache",
    "set_attention",
    "set_cache",
    "unfuse",
    "use_ternary_kernels",
]
