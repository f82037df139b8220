"""Which tokens a query reads: attention modes, chosen in the config by name."""

from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.registry import MODES, parse_mode

__all__ = ["MODES", "AttentionPlan", "parse_mode"]
