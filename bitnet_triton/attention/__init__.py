"""Which keys a query reads: attention modes, chosen in the config by name."""

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import MaskMode, check_served, masked_attention
from bitnet_triton.attention.mode import Mode, Reads
from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.registry import MODES, parse_mode, register_mode

__all__ = [
    "MODES",
    "AttentionContext",
    "AttentionPlan",
    "MaskMode",
    "Mode",
    "Reads",
    "check_served",
    "masked_attention",
    "parse_mode",
    "register_mode",
]
