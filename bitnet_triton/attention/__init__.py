"""Which tokens a query reads: attention modes, chosen in the config by name."""

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.registry import MODES, parse_mode

__all__ = ["MODES", "AttentionContext", "AttentionPlan", "parse_mode"]
