"""What is remembered between steps: keys and values that a mode can still see."""

from bitnet_triton.cache.compressed import CompressedLayer
from bitnet_triton.cache.growing import GrowingLayer, grow_in_place
from bitnet_triton.cache.index_keys import IndexLayer
from bitnet_triton.cache.memory import Call, Memory, begin_call
from bitnet_triton.cache.sinks import SinkWindowLayer
from bitnet_triton.cache.streaming import StreamingLayer
from bitnet_triton.cache.tables import TablesLayer
from bitnet_triton.cache.units import UnitsLayer

__all__ = [
    "Call",
    "CompressedLayer",
    "GrowingLayer",
    "IndexLayer",
    "Memory",
    "SinkWindowLayer",
    "StreamingLayer",
    "TablesLayer",
    "UnitsLayer",
    "begin_call",
    "grow_in_place",
]
