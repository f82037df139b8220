"""The modes as an attention function of transformers, with the mask function that goes with it."""

from bitnet_triton.attention.hub.attend import NAME, attend, set_plan
from bitnet_triton.attention.hub.describe import describe_mask

__all__ = ["NAME", "attend", "describe_mask", "set_plan"]
