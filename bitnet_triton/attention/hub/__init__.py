"""The modes as an attention function of transformers, with the mask function that goes with it."""

from bitnet_triton.attention.hub.function import NAME, attend, count, set_plan
from bitnet_triton.attention.hub.mask import describe_mask

__all__ = ["NAME", "attend", "count", "describe_mask", "set_plan"]
