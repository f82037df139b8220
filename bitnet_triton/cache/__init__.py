"""What is remembered between steps: keys and values that a mode can still see."""

from bitnet_triton.cache.growing import GrowingLayer, grow_in_place
from bitnet_triton.cache.layers import SinkWindowLayer, StreamingLayer

__all__ = ["GrowingLayer", "SinkWindowLayer", "StreamingLayer", "grow_in_place"]
